"""`--dry-run`: what a command would do, the memory of weights, gradients and optimizer, and how long it takes, from a
few measured steps.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from cts_fast.data import Task
from cts_fast.data.images import MappedImages
from cts_fast.engine.gradients import NonFiniteGradient
from cts_fast.experiments.batches import usual_padding
from cts_fast.experiments.experiment import Experiment
from cts_fast.experiments.meta_train import MetaTrainer
from cts_fast.experiments.parallel import task_map
from cts_fast.experiments.report import aligned, fill, number_of
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.settings import labels
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.training import Diverged

WARM, MEASURED = 1, 3  # steps: first ones allocate and choose algorithms
CAPTURED = 4  # steps that are warm where a CUDA graph is captured after three
MEMORY = (
    "The last two columns are the memory of weights, gradients and optimizer; activations, and images on a GPU, come "
    "on top."
)
TESTED = 500  # test images that are measured; the time of all is in proportion


class Planned(Protocol):
    """A run before there is a folder for it."""

    def experiment(self, out: Path, **folder: Any) -> Experiment:
        """The run in its folder."""
        ...


@dataclass(frozen=True)
class Rehearsed:
    """What a dry run found; `folder` was a temporary one and is gone."""

    folder: RunFolder
    text: str

    def run(self, stop: Stop) -> None:
        """Print it."""
        print(self.text)


def rehearsed(plans: Sequence[Planned], out: Path) -> Rehearsed:
    """Takes a few steps of every phase of every run, in a temporary folder; nothing is written into `out`."""
    parts, total = [], 0.0
    for plan in plans:
        with TemporaryDirectory() as folder:
            experiment = plan.experiment(Path(folder))
            with experiment.folder:
                text, seconds = _of(experiment)
        parts.append(text)
        total += seconds
    cores = f" with {torch.get_num_threads()} threads" if experiment.device == "cpu" else ""
    parts.append(
        fill(
            f"In all about {duration(total)} on {experiment.device}{cores}, by {MEASURED} measured steps of each "
            f"phase; without reading and decoding images, checkpoints and figures. Nothing was written into {out}."
        )
    )
    return Rehearsed(experiment.folder, "\n\n".join(parts))


def _of(experiment: Experiment) -> tuple[str, float]:
    """What is said of one run, and its seconds."""
    train, named = experiment.train, labels(list(experiment.methods), experiment.config["meta_lr"])
    rows = [["meta-training", "step size", "ms a step", "time", "weights, gradients", "optimizer"]]
    total, at_a_time = 0.0, 1 if experiment.in_turn else torch.get_num_threads()
    with task_map(experiment.device, in_turn=experiment.in_turn) as map_tasks:
        for name, setup in experiment.methods.items():
            found = measured(experiment, name, map_tasks)
            total += found.seconds
            size = "–" if name == "finetune" else f"{setup.meta_lr:g}"
            per_step = f"{1e3 * found.seconds / train.steps:,.1f}"
            rows.append([named[name], size, per_step, duration(found.seconds), *map(in_bytes, found.memory)])
        tests, seconds = _meta_test(experiment, map_tasks, at_a_time)
    tasks, rounds = number_of(len(experiment.config["tasks"]), "task"), number_of(train.rounds, "round")
    steps = (
        f"{tasks}, each {number_of(train.steps, 'step')} of batch {train.batch_size} in {rounds} of {train.horizon:,}; "
        f"phi is meta-tested after {', '.join(f'{step:,}' for step in sorted(experiment.snapshot_steps))} of them"
    )
    settings = "\n".join(f"{name}: {json.dumps(value)}" for name, value in experiment.config.items())
    trained = [fill(steps), aligned(rows), fill(MEMORY)] if experiment.methods else []
    return "\n\n".join([settings, _tasks(experiment), *trained, tests]), total + seconds


# Meta-training


@dataclass(frozen=True)
class Measured:
    """Seconds of a method's whole meta-training; bytes of weights with gradients, and of the optimizer beside them."""

    seconds: float
    memory: tuple[int, int]


def measured(experiment: Experiment, name: str, map_tasks: Callable[..., list]) -> Measured:
    """Times a method's usual steps, and the last of a round, in which most methods do more, by a round cut short.

    Raises Diverged where a gradient is not finite.
    """
    whole = experiment.train
    warm = CAPTURED if experiment.capture else WARM
    horizon = min(whole.horizon, warm + MEASURED + 1)
    experiment.train = replace(whole, horizon=horizon)
    try:
        trainer = experiment.trainer(name, map_tasks)
    finally:
        experiment.train = whole
    try:
        times = [_seconds(experiment.device, trainer.train_step) for _ in range(warm + MEASURED + 1)]
        memory = bytes_of(trainer)
    except NonFiniteGradient as error:
        raise Diverged(
            f"{name}, within {warm + MEASURED + 1} steps: the gradient of task {trainer.tasks[error.task]!r}, "
            f"parameter {error.parameter!r} is not finite; {experiment.rates(name)}"
        ) from error
    later = list(enumerate(times, 1))[min(warm, horizon - 1) :]  # a round of one step has only last ones
    last = [seconds for step, seconds in later if step % horizon == 0]
    usual = [seconds for step, seconds in later if step % horizon] or last
    rounds = whole.steps / whole.horizon
    return Measured(rounds * ((whole.horizon - 1) * _middle(usual) + _middle(last)), memory)


def bytes_of(trainer: MetaTrainer) -> tuple[int, int]:
    """Bytes of all parameters with their gradients, and of what the optimizer keeps beside them."""
    parameters = [p for net in trainer.nets for p in net.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = _tensors(trainer.optimizer.state_dict()["state"])
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    return _bytes(parameters + gradients), _bytes(t for t in state if t.untyped_storage().data_ptr() not in own)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind tensors, each piece once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# Meta-test


def _meta_test(experiment: Experiment, map_tasks: Callable[..., list], at_a_time: int) -> tuple[str, float]:
    """What is said of the meta-test, and its seconds, where so many runs go on at a time."""
    test = experiment.test
    phis = [(name, step) for name in experiment.methods for step in experiment.snapshot_steps]
    phis += [(name, 0) for name in experiment.untrained]
    runs = Counter(target for _, _, target, _ in experiment.jobs(phis))
    cases = [(task, images) for images in (None, *experiment.more_images) for task in experiment.targets]
    rows = [["meta-test", "runs", "training images", "s a run", "time"]]
    total = 0.0
    found = map_tasks(lambda case: _one_test(experiment, *case), cases)
    for (task, images), (target, count), each in zip(cases, runs.items(), found, strict=True):
        seconds = count * each / at_a_time
        total += seconds
        used = min(images or test.images or len(task.train), len(task.train))
        rows.append([target, f"{count:,}", f"{used:,}", f"{each:,.1f}", duration(seconds)])
    steps = (
        f"Each run: {number_of(test.steps, 'step')} of batch {test.batch_size} and a test on the whole test set; "
        f"{number_of(test.seeds, 'run')}, of seeds of their own, for each of {', '.join(experiment.untrained)} and of "
        f"the initializations, {at_a_time} at a time"
    )
    return f"{fill(steps)}\n\n{aligned(rows)}", total


def _one_test(experiment: Experiment, task: Task, images: int | None) -> float:
    """Seconds of one run on a held-out task, by a few steps and the test of a few images."""
    few = torch.arange(min(TESTED, len(task.test)))
    tester = experiment.tester(replace(task, test=task.test.select(few)), images)
    whole = tester.settings

    def fine_tuned(steps: int) -> tuple[float, Any]:
        tester.settings = replace(whole, steps=steps)
        found: list = []
        return _seconds(experiment.device, lambda: found.extend(tester.fine_tune({}, 0))), found

    fine_tuned(WARM)
    begun, _ = fine_tuned(WARM)
    more, net_and_scale = fine_tuned(WARM + MEASURED)
    step = max(more - begun, 0.0) / MEASURED
    tested = _seconds(experiment.device, lambda: tester.test(*net_and_scale))
    return max(begun - WARM * step, 0.0) + whole.steps * step + tested * len(task.test) / len(few)


# Data


def _tasks(experiment: Experiment) -> str:
    """A table of the tasks: images, classes, sizes, and where the decoded images lie."""
    rows = [["task", "", "training / test images", "classes", "pixels", "padding", "decoded images"]]
    trained = {task.name: task for setup in experiment.methods.values() for task in setup.tasks}
    for use, tasks, settings in (
        ("meta-train", trained.values(), experiment.train),
        ("meta-test", experiment.targets, experiment.test),
    ):
        for task in tasks:
            counts = f"{len(task.train):,} / {len(task.test):,}"
            height, width = (settings.size or side for side in task.train.images.shape[-2:])
            pad = usual_padding(width) if settings.padding is None else settings.padding
            rows.append([task.name, use, counts, str(len(task.classes)), f"{height} x {width}", str(pad), held(task)])
    return aligned(rows)


def held(task: Task) -> str:
    """Where a task's decoded images lie, and how many bytes they are."""
    images = task.train.images
    size = in_bytes(images.shape.numel() + task.test.images.shape.numel())
    if isinstance(images, Tensor):
        return f"{size}, in memory"
    return f"{size}, in a mapped file" if isinstance(images, MappedImages) else f"{size}, decoded for each batch"


# Numbers for people


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def in_bytes(count: int) -> str:
    """Bytes in the unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _seconds(device: str, work: Callable[[], object]) -> float:
    """How long it takes, the device's part too."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _middle(values: Sequence[float]) -> float:
    """The median."""
    return sorted(values)[len(values) // 2]
