"""A run that is stopped wherever it asks for it, and resumed each time, leaves what an uninterrupted one does."""

import dataclasses

import pytest
import torch
from support.image_tasks import make_suite
from torch import nn

from cts_fast.baselines import METHODS
from cts_fast.experiments import training as trainings
from cts_fast.experiments.experiment import Experiment, MethodSetup
from cts_fast.experiments.report import report
from cts_fast.experiments.settings import PRESETS
from cts_fast.experiments.signals import Interrupted, Stop
from cts_fast.models.task_net import TaskNet

LEFT = ("results.json", "metrics.csv", "initialization.safetensors", "accuracy.png", "accuracy-vs-steps.png")
NAMES = ("cts", "fomaml++", "leap", "random-shift", "reptile")


class StopAt(Stop):
    """Asks to stop when it is asked for the n-th time."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left <= 0


class DroppingNet(TaskNet):
    """Draws random numbers in its training as well, and pools to one pixel: to more there is no deterministic way on a
    GPU.
    """

    def __init__(self, num_classes):
        body = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(nn.Sequential(*body, nn.Dropout(0.2)), 6, num_classes)


def named(capture):
    """The methods of a run; a CUDA graph gives no losses, and takes no decisions on the host."""
    return [
        name for name in NAMES if not (capture and (METHODS[name].needs or getattr(METHODS[name], "on_host", False)))
    ]


def make(out, resume=False, device="cpu", capture=False):
    """Three rounds of three steps, a point of the curve every second step, phi looked at in between."""
    tasks = list(make_suite().values())
    preset = PRESETS["quick"]
    train = dataclasses.replace(preset.train, horizon=3, rounds=3)
    test = dataclasses.replace(preset.test, steps=2, seeds=1)
    names = named(capture)
    methods = {name: MethodSetup(METHODS[name], tuple(tasks[:3]), 0.1) for name in names}
    options = dict(device=device, capture=capture, resume=resume, save_every=0.0 if not resume else None)
    config = {"tasks": [task.name for task in tasks[:3]], "targets": [task.name for task in tasks[3:]]}
    config |= {"model": "DroppingNet", "meta_lr": dict.fromkeys(names, 0.1)}
    return Experiment(
        out, config, methods, tasks[3:], make_net=DroppingNet, train=train, test=test, snapshots=[4], seed=3, **options
    )


def run(out, stop, **options):
    experiment = make(out, **options)
    with experiment.folder:
        experiment.run(stop)
        report(experiment, out, 0.0, stop)


def through_interruptions(out, **options):
    """Stopped at the first to the eighth question, in turn, so that a fine-tuning run is left at each of its own and
    ends at last; then after each file of the report. Returns how often."""
    stops = reports = 0
    while True:
        reports += (out / "metrics.csv").exists()  # a report begins anew
        try:
            run(out, StopAt(reports or 1 + stops % 8), resume=stops > 0, **options)
            return stops
        except Interrupted:
            stops += 1


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Networks that draw random numbers do so in one order, and points of the curve take two steps."""
    monkeypatch.setattr(trainings, "POINTS", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_stopped_at_every_phase_a_run_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "whole", Stop())
    assert through_interruptions(tmp_path / "stopped") > 40
    for name in LEFT:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_is_captured_on_a_gpu_can_be():
    assert named(capture=False) == list(NAMES) and named(capture=True) == ["cts", "reptile"]
    for name in named(capture=True):
        METHODS[name]([[nn.Parameter(torch.ones(1))]], capturable=True, backend="torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("capture", [False, True])
def test_on_a_gpu_too(capture, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        run(tmp_path / "whole", Stop(), device="cuda", capture=capture)
        through_interruptions(tmp_path / "stopped", device="cuda", capture=capture)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in LEFT:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
