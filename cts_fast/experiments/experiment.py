"""One run in one folder: meta-train several methods, meta-test them, and go on exactly after an interruption."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.capture import STREAMS
from cts_fast.experiments.batches import task_seed
from cts_fast.experiments.console import Progress
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings
from cts_fast.experiments.meta_train import MakeNet, MetaTrainer, MetaTrainSettings, new_net
from cts_fast.experiments.parallel import task_map
from cts_fast.experiments.run_folder import (
    RunFolder,
    Stop,
    load_state,
    read_json,
    reading,
    save_state,
    write_csv,
    write_json,
)

SAVE_EVERY = 60.0  # seconds between checkpoints
ACCURACY = "meta-test.json"
POINTS = 2000  # a method's curve has at most twice as many points


@dataclass(frozen=True)
class MethodSetup:
    """One method of a run: its class, the tasks that it meta-trains on, and its options beside the shared settings."""

    method: type
    tasks: tuple[Any, ...]
    meta_lr: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Curve:
    """Training losses of one method: `losses[i][t]` is the mean of task t over the steps up to `steps[i]`.

    pending: losses of the steps after the last point, one tensor [T] a step, still on the device.
    """

    tasks: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def close_point(self, step: int) -> None:
        """Make a point of the pending losses; waits for the device."""
        self.steps.append(step)
        self.losses.append(torch.stack(self.pending).mean(0).tolist())
        self.pending.clear()

    @property
    def last(self) -> float:
        """The newest task-average loss; NaN before the first."""
        return sum(self.losses[-1]) / len(self.losses[-1]) if self.losses else math.nan

    @property
    def mean(self) -> list[float]:
        """Task-average losses."""
        return [sum(losses) / len(losses) for losses in self.losses]


class Experiment:
    """Meta-trains and meta-tests; keeps its state as files of the folder `out`.

    Args:
        config: what defines the run, ready for JSON; a resumed run must have the same.
        methods: name to `MethodSetup`. `targets`: tasks to meta-test on.
        make_net: number of classes to a network with a meta-learned `body` and a `head` of the task's own.
        train, test: settings; `snapshots`: meta-training steps at which phi is kept and meta-tested, beside the last.
        resume: go on from the files in `out`; overwrite: replace the run in `out`; otherwise a run in `out` raises
            `CheckpointError`.
    """

    def __init__(
        self,
        out: Path,
        config: dict[str, Any],
        methods: Mapping[str, MethodSetup],
        targets: Sequence[Any],
        *,
        make_net: MakeNet,
        train: MetaTrainSettings,
        test: MetaTestSettings,
        snapshots: Sequence[int],
        seed: int,
        device: str = "cpu",
        resume: bool = False,
        overwrite: bool = False,
        tensorboard: bool = False,
        capture: bool = False,
        streams: int = STREAMS,
        precision: str = "fp32",
    ):
        self.out, self.config, self.methods, self.targets = out, config, methods, targets
        self.make_net, self.train, self.test, self.seed, self.device = make_net, train, test, seed, device
        self.snapshot_steps = frozenset(snapshots) | {train.steps}
        self.tensorboard, self.capture, self.streams, self.precision = tensorboard, capture, streams, precision
        self.curves: dict[str, Curve] = {}
        self.snapshots: dict[str, dict[int, dict[str, Tensor]]] = {}  # method to step to phi
        self.accuracy: dict[tuple[str, int, str, int], float] = {}  # (method, step, target, seed)
        self.folder = RunFolder(out, config, ("checkpoint-*.pt", ACCURACY), resume=resume, overwrite=overwrite)
        if resume and (out / ACCURACY).exists():
            with reading(out / ACCURACY, " to meta-test anew"):
                saved = read_json(out / ACCURACY)
                self.accuracy = {(method, step, target, seed): value for method, step, target, seed, value in saved}

    @property
    def model_name(self) -> str:
        """What the networks are called: the name of their class."""
        return type(new_net(self.make_net, 1, seed=self.seed, head="name")).__name__

    def run(self, stop: Stop) -> None:
        """Does what is not done yet; raises `Interrupted` when `stop` was requested and everything is saved."""
        with task_map(self.device) as map_tasks:
            for name in self.methods:
                self.meta_train(name, stop, map_tasks)
            self.meta_test(stop, map_tasks)
        self.write_metrics()

    def accuracy_at(self, method: str, step: int) -> dict[str, list[float]]:
        """Held-out task to accuracies, one per seed, of phi after `step` meta-training steps."""
        seeds = range(self.test.seeds)
        return {task.name: [self.accuracy[method, step, task.name, seed] for seed in seeds] for task in self.targets}

    def final_accuracy(self) -> dict[str, dict[str, list[float]]]:
        """Method to held-out task to accuracies of the last phi; `scratch` is one of the methods."""
        last = {name: self.accuracy_at(name, self.train.steps) for name in self.methods}
        return {**last, "scratch": self.accuracy_at("scratch", 0)}

    # Meta-training

    def meta_train(self, name: str, stop: Stop, map_tasks: Callable[..., list]) -> None:
        """Meta-trains one method to its last step, from its checkpoint if there is one."""
        trainer = self._trainer(name, map_tasks)
        curve = self.curves[name] = Curve(trainer.tasks)
        snapshots = self.snapshots[name] = {}
        if self.checkpoint(name).exists():
            self._load(name, trainer)
        steps_per_point = max(1, self.train.steps // POINTS)
        writer = self._tensorboard_writer(name)
        saved = time.monotonic()
        with Progress(f"meta-train {name}", self.train.steps, trainer.step) as progress:
            while trainer.step < self.train.steps:
                curve.pending.append(trainer.train_step())
                last = trainer.step == self.train.steps
                if trainer.step in self.snapshot_steps:
                    snapshots[trainer.step] = trainer.initialization
                if len(curve.pending) == steps_per_point or last:
                    curve.close_point(trainer.step)
                    if writer:
                        writer.add_scalar("meta-train/loss", curve.last, trainer.step)
                if stop():  # before anything is printed: a hang-up closes the output too
                    self._save(name, trainer)
                    stop.check()
                if time.monotonic() - saved > SAVE_EVERY or last:
                    self._save(name, trainer)
                    saved = time.monotonic()
                progress.advance(f"loss {curve.last:.3f}")
        if not all(math.isfinite(loss) for loss in curve.mean):
            meta_lr = self.methods[name].meta_lr
            print(f"warning: the training loss of {name} is not finite: its meta_lr ({meta_lr}) is too large")

    def _trainer(self, name: str, map_tasks: Callable[..., list]) -> MetaTrainer:
        setup = self.methods[name]
        return MetaTrainer(
            setup.method,
            setup.tasks,
            self.train,
            make_net=self.make_net,
            meta_lr=setup.meta_lr,
            seed=self.seed,
            device=self.device,
            map_tasks=map_tasks,
            capture=self.capture,
            streams=self.streams,
            precision=self.precision,
            **setup.options,
        )

    def _tensorboard_writer(self, name: str) -> Any:
        if not self.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.out / "tensorboard" / name)

    # Meta-test

    def meta_test(self, stop: Stop, map_tasks: Callable[..., list]) -> None:
        """Fine-tunes every initialization on every target with every seed, as far as that is not done yet."""
        phis = {(name, step): phi for name, kept in self.snapshots.items() for step, phi in kept.items()}
        phis["scratch", 0] = {}  # every seed draws a body of its own
        testers = {
            task.name: MetaTester(task, self.test, make_net=self.make_net, device=self.device, precision=self.precision)
            for task in self.targets
        }
        jobs = [
            (method, step, target, seed)
            for seed in range(self.test.seeds)
            for target in testers
            for method, step in phis
        ]
        todo = [job for job in jobs if job not in self.accuracy]
        lock = threading.Lock()

        def work(job: tuple[str, int, str, int]) -> None:
            if stop():
                return
            method, step, target, seed = job
            accuracy = testers[target].accuracy(phis[method, step], task_seed(self.seed, "meta-test", seed))
            with lock:
                self.accuracy[job] = accuracy
                self._save_accuracy()
                progress.advance(f"{method} on {target}: {100 * accuracy:.1f} %")

        with Progress("meta-test", len(jobs), len(jobs) - len(todo), unit="run") as progress:
            map_tasks(work, todo)
        if len(self.accuracy) < len(jobs):
            stop.check()

    # Files

    def checkpoint(self, name: str) -> Path:
        """Where the state of one method's meta-training is kept."""
        return self.out / f"checkpoint-{name}.pt"

    def _save(self, name: str, trainer: MetaTrainer) -> None:
        curve = self.curves[name]
        state = {
            "trainer": trainer.state_dict(),
            "pending": curve.pending,
            "steps": curve.steps,
            "losses": curve.losses,
            "snapshots": self.snapshots[name],
        }
        save_state(self.checkpoint(name), state)

    def _load(self, name: str, trainer: MetaTrainer) -> None:
        path, curve = self.checkpoint(name), self.curves[name]
        with reading(path, " to meta-train this method anew"):
            # on the CPU, where generators and data orders live; what belongs on the device is copied into place
            state = load_state(path)
            trainer.load_state_dict(state["trainer"])
            curve.steps, curve.losses = state["steps"], state["losses"]
            curve.pending = [losses.to(self.device) for losses in state["pending"]]
            self.snapshots[name].update(state["snapshots"])

    def _save_accuracy(self) -> None:
        write_json(self.out / ACCURACY, [[*job, value] for job, value in self.accuracy.items()])

    def write_metrics(self) -> None:
        """metrics.csv: one line per loss or accuracy."""
        columns = ("phase", "method", "step", "task", "seed", "loss", "accuracy")
        write_csv(self.out / "metrics.csv", columns, self._metrics())

    def _metrics(self) -> Iterator[tuple]:
        for name, curve in self.curves.items():
            for step, losses in zip(curve.steps, curve.losses, strict=True):
                for task, loss in zip(curve.tasks, losses, strict=True):
                    yield "meta-train", name, step, task, self.seed, loss, ""
        for (method, step, target, seed), accuracy in sorted(self.accuracy.items()):
            yield "meta-test", method, step, target, seed, "", accuracy
