"""One run in one folder: meta-train several methods, meta-test them, and go on exactly after an interruption."""

import csv
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.capture import STREAMS
from cts_fast.experiments.batches import task_seed
from cts_fast.experiments.meta_test import MetaTester
from cts_fast.experiments.meta_train import MetaTrainer
from cts_fast.experiments.parallel import task_map
from cts_fast.experiments.progress import Progress
from cts_fast.experiments.run_folder import (
    DAMAGE,
    NOT_NOW,
    CheckpointError,
    RunFolder,
    Stop,
    first_line,
    load_state,
    not_now,
    read_json,
    save_state,
    write_json,
    written,
)

SAVE_EVERY = 60.0  # seconds between checkpoints
ACCURACY = "meta-test.json"
POINTS = 2000  # a method's curve has at most twice as many points


@dataclass(frozen=True)
class Entry:
    """One method of a run: its class, the tasks that it meta-trains on, and its options beside the shared settings."""

    method: type
    tasks: tuple[Any, ...]
    meta_lr: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Curve:
    """Training losses of one method: `losses[i][t]` is the mean of task t over the steps up to `steps[i]`."""

    tasks: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)

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
        entries: method name to `Entry`. `targets`: tasks to meta-test on.
        train, test: settings; `snapshots`: meta-training steps at which phi is kept and meta-tested, beside the last.
        resume: go on from the files in `out`; overwrite: replace the run in `out`; otherwise a run in `out` raises `CheckpointError`.
    """

    def __init__(
        self,
        out: Path,
        config: dict[str, Any],
        entries: Mapping[str, Entry],
        targets: Sequence[Any],
        *,
        train: Any,
        test: Any,
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
        self.out, self.config, self.entries, self.targets = out, config, entries, targets
        self.train, self.test, self.seed, self.device = train, test, seed, device
        self.snapshot_steps = frozenset(snapshots) | {train.steps}
        self.tensorboard, self.capture, self.streams, self.precision = tensorboard, capture, streams, precision
        self.curves: dict[str, Curve] = {}
        self.snapshots: dict[str, dict[int, dict[str, Tensor]]] = {}  # method to step to phi
        self.accuracy: dict[tuple[str, int, str, int], float] = {}  # (method, step, target, seed)
        self.folder = RunFolder(out, config, ("checkpoint-*.pt", ACCURACY), resume=resume, overwrite=overwrite)
        if resume and (out / ACCURACY).exists():
            saved = read_json(out / ACCURACY)
            try:
                self.accuracy = {(method, step, target, seed): value for method, step, target, seed, value in saved}
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{out / ACCURACY} is damaged: delete it to meta-test anew, then resume"
                ) from error

    def run(self, stop: Stop) -> None:
        """Does what is not done yet; raises `Interrupted` when `stop` was requested and everything is saved."""
        with task_map(self.device) as map_tasks:
            for name in self.entries:
                self._meta_train(name, stop, map_tasks)
            self._meta_test(stop, map_tasks)
        self.write_metrics()

    def accuracy_at(self, method: str, step: int) -> dict[str, list[float]]:
        """Held-out task to accuracies, one per seed, of phi after `step` meta-training steps."""
        seeds = range(self.test.seeds)
        return {task.name: [self.accuracy[method, step, task.name, seed] for seed in seeds] for task in self.targets}

    def final_accuracy(self) -> dict[str, dict[str, list[float]]]:
        """Method to held-out task to accuracies of the last phi; `scratch` is one of the methods."""
        last = {name: self.accuracy_at(name, self.train.steps) for name in self.entries}
        return {**last, "scratch": self.accuracy_at("scratch", 0)}

    # Meta-training

    def _meta_train(self, name: str, stop: Stop, map_tasks: Callable[..., list]) -> None:
        entry = self.entries[name]
        trainer = MetaTrainer(
            entry.method,
            entry.tasks,
            self.train,
            meta_lr=entry.meta_lr,
            seed=self.seed,
            device=self.device,
            map_tasks=map_tasks,
            capture=self.capture,
            streams=self.streams,
            precision=self.precision,
            **entry.options,
        )
        curve = self.curves[name] = Curve(trainer.tasks)
        kept = self.snapshots[name] = {}
        pending: list[Tensor] = []
        path = self.checkpoint(name)
        if path.exists():
            pending = self._load(path, trainer, curve, kept)
        every = max(1, self.train.steps // POINTS)
        writer = self._tensorboard_writer(name)

        def save() -> None:
            save_state(
                path,
                {
                    "trainer": trainer.state_dict(),
                    "pending": pending,
                    "steps": curve.steps,
                    "losses": curve.losses,
                    "snapshots": kept,
                },
            )

        saved = time.monotonic()
        with Progress(f"meta-train {name}", self.train.steps, trainer.step) as progress:
            while trainer.step < self.train.steps:
                pending.append(trainer.train_step())
                if trainer.step in self.snapshot_steps:
                    kept[trainer.step] = trainer.initialization
                if len(pending) == every or trainer.step == self.train.steps:
                    curve.steps.append(trainer.step)
                    curve.losses.append(torch.stack(pending).mean(0).tolist())
                    pending.clear()
                    if writer:
                        writer.add_scalar("meta-train/loss", curve.last, trainer.step)
                if stop():  # before anything is printed: a hang-up closes the output too
                    save()
                    stop.check()
                if time.monotonic() - saved > SAVE_EVERY or trainer.step == self.train.steps:
                    save()
                    saved = time.monotonic()
                progress.advance(f"loss {curve.last:.3f}")
        if not all(math.isfinite(loss) for loss in curve.mean):
            print(f"warning: the training loss of {name} is not finite: its meta_lr ({entry.meta_lr}) is too large")

    def _tensorboard_writer(self, name: str) -> Any:
        if not self.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.out / "tensorboard" / name)

    # Meta-test

    def _meta_test(self, stop: Stop, map_tasks: Callable[..., list]) -> None:
        phis = {(name, step): phi for name, kept in self.snapshots.items() for step, phi in kept.items()}
        phis["scratch", 0] = {}  # every seed draws a body of its own
        testers = {
            task.name: MetaTester(task, self.test, device=self.device, precision=self.precision)
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

    def _load(self, path: Path, trainer: MetaTrainer, curve: Curve, kept: dict) -> list[Tensor]:
        try:
            # on the CPU, where generators and data orders live; what belongs on the device is copied into place
            state = load_state(path)
            trainer.load_state_dict(state["trainer"])
            curve.steps, curve.losses = state["steps"], state["losses"]
            kept.update(state["snapshots"])
            return [losses.to(self.device) for losses in state["pending"]]
        except NOT_NOW as error:
            raise not_now(path, error) from error
        except DAMAGE as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged ({first_line(error)}): delete it to "
                "meta-train this method anew, then resume"
            ) from error

    def _save_accuracy(self) -> None:
        write_json(self.out / ACCURACY, [[*job, value] for job, value in self.accuracy.items()])

    def write_metrics(self) -> None:
        """metrics.csv: one line per loss or accuracy."""
        with written(self.out / "metrics.csv", "w") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", "method", "step", "task", "seed", "loss", "accuracy"])
            for name, curve in self.curves.items():
                for step, losses in zip(curve.steps, curve.losses, strict=True):
                    writer.writerows(
                        ["meta-train", name, step, task, self.seed, loss, ""]
                        for task, loss in zip(curve.tasks, losses, strict=True)
                    )
            writer.writerows(
                ["meta-test", method, step, target, seed, "", accuracy]
                for (method, step, target, seed), accuracy in sorted(self.accuracy.items())
            )
