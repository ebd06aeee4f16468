"""One run in one folder: meta-train several methods, meta-test them, and go on exactly after an interruption."""

import csv
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import task_seed
from .capture import STREAMS
from .metatest import MetaTester
from .parallel import task_map
from .progress import Progress
from .training import MetaTrainer

SAVE_EVERY = 60.0  # seconds between checkpoints
POINTS = 2000  # a method's curve has at most twice as many points


class Interrupted(Exception):
    """The user asked to stop; everything is saved."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message names the file and says what to do."""


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


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second Ctrl-C stops at once."""
    requested = threading.Event()
    first = math.inf

    def on_signal(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        first = min(first, now)
        requested.set()
        if now - first > 1:  # a wrapper may pass one Ctrl-C on twice
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


class Experiment:
    """Meta-trains and meta-tests; keeps its state as files of the folder `out`.

    Args:
        config: what defines the run, ready for JSON; a resumed run must have the same.
        entries: method name to `Entry`. `targets`: tasks to meta-test on.
        train, test: settings; `snapshots`: meta-training steps at which phi is kept and meta-tested, beside the last.
        resume: go on from the files in `out`; otherwise a run in `out` that was not finished raises `CheckpointError`.
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
        self._prepare(resume)

    def run(self) -> None:
        """Does what is not done yet; raises `Interrupted` when Ctrl-C was pressed and everything is saved."""
        with stop_on_interrupt() as stop, task_map(self.device) as map_tasks:
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

    def _meta_train(self, name: str, stop: Callable[[], bool], map_tasks: Callable[..., list]) -> None:
        entry = self.entries[name]
        trainer = MetaTrainer(
            entry.method,
            entry.tasks,
            self.train,
            meta_lr=entry.meta_lr,
            seed=self.seed,
            device=self.device,
            map=map_tasks,
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
            save_atomically(
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
                progress.advance(f"loss {curve.last:.3f}")
                if stop():
                    save()
                    raise Interrupted
                if time.monotonic() - saved > SAVE_EVERY or trainer.step == self.train.steps:
                    save()
                    saved = time.monotonic()
        if not all(math.isfinite(loss) for loss in curve.mean):
            print(f"warning: the training loss of {name} is not finite: its meta_lr ({entry.meta_lr}) is too large")

    def _tensorboard_writer(self, name: str) -> Any:
        if not self.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.out / "tensorboard" / name)

    # Meta-test

    def _meta_test(self, stop: Callable[[], bool], map_tasks: Callable[..., list]) -> None:
        phis = {(name, step): phi for name, kept in self.snapshots.items() for step, phi in kept.items()}
        phis["scratch", 0] = {}  # every seed draws a body of its own
        testers = {task.name: MetaTester(task, self.test, device=self.device, precision=self.precision) for task in self.targets}
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
            raise Interrupted

    # Files

    def checkpoint(self, name: str) -> Path:
        """Where the state of one method's meta-training is kept."""
        return self.out / f"checkpoint-{name}.pt"

    def _prepare(self, resume: bool) -> None:
        """Finds out what `out` holds: nothing, a finished run, or one to resume."""
        config_file, accuracy_file = self.out / "config.json", self.out / "meta-test.json"
        if resume:
            check_same_config(config_file, self.config)
            if accuracy_file.exists():
                self.accuracy = {
                    (method, step, target, seed): accuracy
                    for method, step, target, seed, accuracy in read_json(accuracy_file)
                }
            return
        stale = [*self.out.glob("checkpoint-*.pt"), accuracy_file]
        if config_file.exists() and not (self.out / "results.json").exists() and any(map(Path.exists, stale)):
            raise CheckpointError(
                f"{self.out} holds a run that was interrupted: add --resume to go on with it, "
                "or choose another --out, or delete the folder"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        for path in (*stale, self.out / "results.json"):
            path.unlink(missing_ok=True)
        write_text(config_file, json.dumps(self.config, indent=1))

    def _load(self, path: Path, trainer: MetaTrainer, curve: Curve, kept: dict) -> list[Tensor]:
        try:
            # on the CPU, where generators and data orders live; what belongs on the device is copied into place
            state = torch.load(path, weights_only=True, map_location="cpu")
            trainer.load_state_dict(state["trainer"])
            curve.steps, curve.losses = state["steps"], state["losses"]
            kept.update(state["snapshots"])
            return [losses.to(self.device) for losses in state["pending"]]
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the checkpoint {path} is damaged ({str(error).splitlines()[0]}): delete it to "
                "meta-train this method anew, then resume"
            ) from error

    def _save_accuracy(self) -> None:
        write_text(self.out / "meta-test.json", json.dumps([[*job, value] for job, value in self.accuracy.items()]))

    def write_metrics(self) -> None:
        """metrics.csv: one line per loss or accuracy."""
        with open(self.out / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", "method", "step", "task", "seed", "loss", "accuracy"])
            for name, curve in self.curves.items():
                for step, losses in zip(curve.steps, curve.losses):
                    writer.writerows(
                        ["meta-train", name, step, task, self.seed, loss, ""] for task, loss in zip(curve.tasks, losses)
                    )
            writer.writerows(
                ["meta-test", method, step, target, seed, "", accuracy]
                for (method, step, target, seed), accuracy in sorted(self.accuracy.items())
            )


def save_atomically(path: Path, state: Any) -> None:
    """Writes beside the old file and then takes its place, so that one of the two is always whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes beside the old file and then takes its place."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def check_same_config(path: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError if the run whose config is in the file is not there or is another one."""
    saved = read_json(path)
    changed = [key for key in sorted({*saved, *config}) if saved.get(key) != config.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {saved.get(key)!r}, now {config.get(key)!r}" for key in changed)
        raise CheckpointError(
            f"{path.parent} holds another run ({differences}): "
            "give the same arguments, or another --out without --resume"
        )


def read_json(path: Path) -> Any:
    """What a run left in a file; raises CheckpointError that says what to do where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"there is no run to resume: {path} is missing; start it without --resume") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): start anew in another --out") from error
