"""One run in one folder: meta-train several methods, meta-test them, and go on exactly after an interruption."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.capture import STREAMS
from cts_fast.engine.gradients import NonFiniteGradient
from cts_fast.experiments.batches import task_seed
from cts_fast.experiments.checkpoint import CheckpointError, Checkpoints
from cts_fast.experiments.console import Progress
from cts_fast.experiments.files import write_csv
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings
from cts_fast.experiments.meta_train import MakeNet, MetaTrainer, MetaTrainSettings, check_held_out
from cts_fast.experiments.parallel import task_map
from cts_fast.experiments.run_folder import FINISHED, SWEPT, RunFolder
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.weights import UNTRAINED, Weights, untrained_phis

ACCURACY = "accuracy.json"
DIGESTED = 1 << 26  # bytes of a set's images that tell it from another
POINTS = 2000  # a method's curve has at most twice as many points


class Diverged(ArithmeticError):
    """A gradient is not finite; the message names method, step, task and parameter."""


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
        config: what defines the run, ready for JSON, the name of its model included; a resumed run must have the same.
        methods: name to `MethodSetup`. `targets`: tasks to meta-test on.
        make_net: number of classes to a network with a meta-learned `body` and a `head` of the task's own.
        train, test: settings; `snapshots`: meta-training steps at which phi is kept and meta-tested, beside the last.
        weights: to begin meta-training at, and to meta-test as `none`; None: the random body of the seed.
        untrained: what is meta-tested without meta-training: `scratch`, and `none` where there are weights.
        more_images: further numbers of training images to fine-tune the last phi on, beside `test.images`.
        resume: go on from the checkpoints in `out`; overwrite: replace the run in `out`; otherwise a run in `out`
            raises `CheckpointError`. save_every: seconds between checkpoints; see `Checkpoints`.

    It has `out` for itself until `folder` is closed.
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
        weights: Weights | None = None,
        untrained: Sequence[str] = UNTRAINED,
        more_images: Sequence[int] = (),
        device: str = "cpu",
        resume: bool = False,
        overwrite: bool = False,
        save_every: float | None = None,
        tensorboard: bool = False,
        capture: bool = False,
        streams: int = STREAMS,
        precision: str = "fp32",
    ):
        self.out, self.config, self.methods, self.targets = out, config, methods, targets
        self.make_net, self.train, self.test, self.seed, self.device = make_net, train, test, seed, device
        self.weights, self.more_images = weights, tuple(more_images)
        self.untrained = {name: phi for name, phi in untrained_phis(weights).items() if name in untrained}
        self.snapshot_steps = frozenset(snapshots) | {train.steps}
        self.tensorboard, self.capture, self.streams, self.precision = tensorboard, capture, streams, precision
        self.curves: dict[str, Curve] = {}
        self.snapshots: dict[str, dict[int, dict[str, Tensor]]] = {}  # method to step to phi
        self.bodies: dict[str, dict[str, Tensor]] = {}  # of methods that train one task: its last body, statistics too
        self.accuracy: dict[tuple[str, int, str, int], float] = {}  # (method, step, target as `_at` names it, seed)
        self.resume = resume
        tasks = [task for setup in methods.values() for task in setup.tasks]
        self.digests = {task.name: digest(task) for task in {task.name: task for task in (*tasks, *targets)}.values()}
        for setup in methods.values():
            check_held_out(setup.method, setup.tasks, train)
        # last: whatever is wrong with the arguments, an older run is still there
        folder = {"resume": resume, "overwrite": overwrite, "save_every": save_every}
        self.folder = RunFolder(out, config, parts=(SWEPT,), **folder)  # a sweep may be what is there

    @property
    def model_name(self) -> str:
        """What the networks are called."""
        return self.config["model"]

    def run(self, stop: Stop) -> None:
        """Does what is not done yet; raises `Interrupted` when `stop` was requested and everything is saved."""
        with task_map(self.device) as map_tasks:
            for name in self.methods:
                self.meta_train(name, stop, map_tasks)
            self.meta_test(stop, map_tasks)
        self.write_metrics()

    def accuracy_at(self, method: str, step: int, images: int | None = None) -> dict[str, list[float]]:
        """Held-out task to accuracies, one per seed, of phi after `step` meta-training steps.

        images: one of `more_images`, for the last phi; None: `test.images`.
        """
        seeds = range(self.test.seeds)
        return {
            task.name: [self.accuracy[method, step, _at(task.name, images), seed] for seed in seeds]
            for task in self.targets
        }

    def final_accuracy(self, images: int | None = None) -> dict[str, dict[str, list[float]]]:
        """Method to held-out task to accuracies of the last phi, and of what is `untrained`; images: as above."""
        last = {name: self.accuracy_at(name, self.train.steps, images) for name in self.methods}
        return {**last, **{name: self.accuracy_at(name, 0, images) for name in self.untrained}}

    # Meta-training

    def meta_train(self, name: str, stop: Stop, map_tasks: Callable[..., list]) -> None:
        """Meta-trains one method to its last step, from its newest checkpoint if there is one.

        Raises Diverged when a gradient or a parameter is not finite; what was saved before stays.
        """
        torch.manual_seed(task_seed(self.seed, "meta-train"))  # of what networks draw: the same after another method
        trainer = self.trainer(name, map_tasks)
        self.curves[name], self.snapshots[name] = Curve(trainer.tasks), {}
        kept = self._checkpoints(name, self.methods[name].tasks)
        found = kept.load(lambda parts: self._load(name, trainer, parts["rank-0.pt"])) if self.resume else None
        if self.resume and found is None and self.folder.finished:
            raise CheckpointError(
                f"{self.out} holds a finished run, but {kept.path} is gone: delete {FINISHED} there to meta-train "
                f"{name} anew, then resume"
            )
        if self.resume:
            print(f"meta-train {name}: goes on from {found or 'its first step: nothing was saved yet'}", flush=True)
        try:
            self._train(name, trainer, kept, stop)
        except NonFiniteGradient as error:
            at = f"step {trainer.step + 1}" if self.device == "cpu" else f"at or before step {trainer.step + 1}"
            what = f"the gradient of task {trainer.tasks[error.task]!r}, parameter {error.parameter!r}"
            raise self._diverged(name, at, what, kept) from error
        if len(trainer.nets) == 1:
            self.bodies[name] = trainer.nets[0].body.state_dict()

    def _diverged(self, name: str, at: str, what: str, kept: Checkpoints) -> Diverged:
        rates = f"its meta_lr ({self.methods[name].meta_lr}) or the lr ({self.train.lr}) is too large"
        good = f"the last good checkpoint is {kept.newest}" if kept.newest else "nothing was saved yet"
        return Diverged(f"{name}, {at}: {what} is not finite; {rates}; {good}")

    def _check_finite(self, name: str, trainer: MetaTrainer, kept: Checkpoints) -> None:
        """Raises Diverged where a parameter is not finite: held-out gradients, too large rates and the last step show
        in no gradient that a step looks at.
        """
        if self.methods[name].options.get("nonfinite", "raise") != "raise":
            return
        named = [
            (f"the initialization's {n!r}", phi) for n, phi in trainer.optimizer.initialization_state_dict().items()
        ]
        for task, net in zip(trainer.tasks, trainer.nets, strict=True):
            named += [(f"task {task!r}, parameter {n!r}", param) for n, param in net.named_parameters()]
        for what, tensor in named:
            if not tensor.isfinite().all():
                raise self._diverged(name, f"at or before step {trainer.step}", what, kept)

    def _train(self, name: str, trainer: MetaTrainer, kept: Checkpoints, stop: Stop) -> None:
        curve = self.curves[name]
        steps_per_point = max(1, self.train.steps // POINTS)
        writer = self._tensorboard_writer(name)
        with Progress(f"meta-train {name}", self.train.steps, trainer.step) as progress:
            while trainer.step < self.train.steps:
                curve.pending.append(trainer.train_step())
                last = trainer.step == self.train.steps
                if trainer.step in self.snapshot_steps:
                    self.snapshots[name][trainer.step] = trainer.initialization
                if len(curve.pending) == steps_per_point or last:
                    curve.close_point(trainer.step)
                    if writer:
                        writer.add_scalar("meta-train/loss", curve.last, trainer.step)
                if stop() or last or kept.due:
                    self._save(name, trainer, kept)
                    stop.check()  # before anything is printed: a hang-up closes the output too
                progress.advance(f"loss {curve.last:.3f}")

    def trainer(self, name: str, map_tasks: Callable[..., list]) -> MetaTrainer:
        """What meta-trains a method, at its first step."""
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
            start=self.weights.state if self.weights else None,
            **{"nonfinite": "raise", **setup.options},
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
        phis |= {(name, 0): phi for name, phi in self.untrained.items()}  # of `scratch` every seed draws its own body
        testers = {
            _at(task.name, images): self.tester(task, images)
            for images in (None, *self.more_images)
            for task in self.targets
        }
        jobs = self.jobs(phis)
        kept = self._checkpoints("meta-test", self.targets)
        if self.resume:
            kept.load(lambda parts: self.accuracy.update({tuple(job): value for *job, value in parts[ACCURACY]}))
        todo = [job for job in jobs if job not in self.accuracy]
        lock = threading.Lock()

        def work(job: tuple[str, int, str, int]) -> None:
            if stop():
                return
            method, step, target, seed = job
            accuracy = testers[target].accuracy(phis[method, step], task_seed(self.seed, "meta-test", seed))
            with lock:
                self.accuracy[job] = accuracy
                done = [[*job, value] for job, value in self.accuracy.items()]
                kept.save({ACCURACY: done}, f"{len(done)} of {len(jobs)} runs")
                progress.advance(f"{method} on {target}: {100 * accuracy:.1f} %")

        with Progress("meta-test", len(jobs), len(jobs) - len(todo), unit="run") as progress:
            map_tasks(work, todo)
        if len(self.accuracy) < len(jobs):
            stop.check()

    def tester(self, task: Any, images: int | None = None) -> MetaTester:
        """What fine-tunes on a held-out task; images: how many, None for `test.images`."""
        test = self.test if images is None else replace(self.test, images=images)
        return MetaTester(task, test, make_net=self.make_net, device=self.device, precision=self.precision)

    def jobs(self, phis: Iterable[tuple[str, int]]) -> list[tuple[str, int, str, int]]:
        """Runs of the meta-test of these (method, step): all on `test.images`, the last phi on `more_images` too."""
        last = (0, self.train.steps)
        return [
            (method, step, _at(task.name, images), seed)
            for seed in range(self.test.seeds)
            for images in (None, *self.more_images)
            for task in self.targets
            for method, step in phis
            if images is None or step in last
        ]

    # Files

    def _checkpoints(self, part: str, tasks: Sequence[Any]) -> Checkpoints:
        data = {task.name: self.digests[task.name] for task in tasks}
        return self.folder.checkpoints(part, data=data)

    def _save(self, name: str, trainer: MetaTrainer, kept: Checkpoints) -> None:
        curve = self.curves[name]
        state = {
            "trainer": trainer.state_dict(),
            "pending": curve.pending,
            "steps": curve.steps,
            "losses": curve.losses,
            "snapshots": self.snapshots[name],
        }
        self._check_finite(name, trainer, kept)  # after the optimizer has told of a gradient, which says more
        note = f"step {trainer.step} of {self.train.steps}"
        kept.save({"rank-0.pt": state, "initialization.safetensors": trainer.initialization}, note)

    def _load(self, name: str, trainer: MetaTrainer, state: dict[str, Any]) -> None:
        curve = self.curves[name]
        # the state is on the CPU, where generators and data orders live; what belongs on the device is copied there
        trainer.load_state_dict(state["trainer"])
        curve.steps, curve.losses = state["steps"], state["losses"]
        curve.pending = [losses.to(self.device) for losses in state["pending"]]
        self.snapshots[name].clear()  # of a damaged checkpoint
        self.snapshots[name].update(state["snapshots"])

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


def _at(target: str, images: int | None) -> str:
    """What a held-out task is called where another number of its images than `test.images` is fine-tuned on."""
    return target if images is None else f"{target}@{images}"


def digest(task: Any) -> str:
    """What a task's images and labels are, in a few letters: a run goes on with the data that it began with.

    Of a large set, images are taken at equal distances.
    """
    found = hashlib.blake2b(digest_size=8)
    for part in (task.train, task.test):
        found.update(repr((tuple(part.images.shape), tuple(task.classes))).encode())
        stride = math.ceil(part.images.shape.numel() / DIGESTED) or 1
        for tensor in (part.labels, part.images[::stride]):
            found.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return found.hexdigest()
