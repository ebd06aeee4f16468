"""One run in one folder: meta-train several methods, meta-test them, and go on exactly after an interruption."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.capture import STREAMS
from cts_fast.distributed.launch import ALONE, Team
from cts_fast.experiments.batches import task_seed
from cts_fast.experiments.checkpoint import CheckpointError, Checkpoints, differences
from cts_fast.experiments.console import Progress
from cts_fast.experiments.files import write_csv
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings
from cts_fast.experiments.meta_train import (
    MakeNet,
    MetaTrainer,
    MetaTrainSettings,
    check_held_out,
    draws_numbers,
    pixels,
)
from cts_fast.experiments.parallel import deal, task_map
from cts_fast.experiments.run_folder import CHECKPOINTS, FINISHED, SWEPT, TENSORBOARD, RunFolder
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.training import Curve, Training
from cts_fast.experiments.weights import UNTRAINED, Weights, untrained_phis

META_TEST, ACCURACY = "meta-test", "accuracy.json"
DIGESTED = 1 << 26  # bytes of a set's images that tell it from another
Job = tuple[str, int, str, int]  # of the meta-test: method, step, target as `at_images` names it, seed


@dataclass(frozen=True)
class MethodSetup:
    """One method of a run: its class, the tasks that it meta-trains on, and its options beside the shared settings."""

    method: type
    tasks: tuple[Any, ...]
    meta_lr: float
    options: Mapping[str, Any] = field(default_factory=dict)


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
        team: the ranks that share the work, each with the same arguments; device: of this one.

    Over ranks the tasks of a method are spread by what they cost, and so are the runs of the meta-test. A method of one
    task, or one that runs in one process, is trained by one rank while others train another such one.

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
        team: Team = ALONE,
    ):
        self.out, self.config, self.methods, self.targets, self.team = out, config, methods, targets, team
        self.make_net, self.train, self.test, self.seed, self.device = make_net, train, test, seed, device
        self.weights, self.more_images = weights, tuple(more_images)
        self.untrained = {name: phi for name, phi in untrained_phis(weights).items() if name in untrained}
        self.snapshot_steps = frozenset(snapshots) | {train.steps}
        self.tensorboard, self.capture, self.streams, self.precision = tensorboard, capture, streams, precision
        self.curves: dict[str, Curve] = {}
        self.snapshots: dict[str, dict[int, dict[str, Tensor]]] = {}  # method to step to phi
        self.bodies: dict[str, dict[str, Tensor]] = {}  # of methods that train one task: its last body, statistics too
        self.accuracy: dict[Job, float] = {}
        self.digests, self.together, self.alone = checked(config, methods, targets, train, team, capture)
        # last: whatever is wrong with the arguments, an older run is still there
        folder = {"resume": resume, "overwrite": overwrite, "save_every": save_every}
        self.folder = RunFolder(out, config, parts=(SWEPT,), team=team, **folder)  # a sweep may be what is there
        self.resume = self.folder.resume

    @property
    def model_name(self) -> str:
        """What the networks are called."""
        return self.config["model"]

    @cached_property
    def in_turn(self) -> bool:
        """Whether one network trains after the other: on a GPU, and where they would draw from one generator."""
        side, images = self.test.size, self.targets[0].train.images
        shape = (side, side) if side else images.shape[-2:]
        return torch.device(self.device).type != "cpu" or draws_numbers(self.make_net, shape)

    def run(self, stop: Stop) -> None:
        """Does what is not done yet; raises `Interrupted` when `stop` was requested and everything is saved."""
        with task_map(self.device, in_turn=self.in_turn) as map_tasks:
            for name in self.together:
                self.meta_train(name, self.team, stop, map_tasks)
            for name in self.alone[self.team.rank]:
                self.meta_train(name, ALONE, stop, map_tasks)
            self._tell_of_methods_trained_alone()
            self.meta_test(stop, map_tasks)
        if self.team.is_first:
            self.write_metrics()

    def _tell_of_methods_trained_alone(self) -> None:
        """All ranks have the curves and initializations of all methods, in the methods' order."""
        own = {}
        for name in self.alone[self.team.rank]:
            snapshots = {step: on_cpu(phi) for step, phi in self.snapshots[name].items()}
            own[name] = self.curves[name], snapshots, self.bodies.get(name)
        for found in self.team.gather(own, patiently=True):
            for name, (curve, snapshots, body) in found.items():
                self.curves[name], self.snapshots[name] = curve, snapshots
                if body is not None:
                    self.bodies[name] = body
        self.curves = {name: self.curves[name] for name in self.methods}
        self.snapshots = {name: self.snapshots[name] for name in self.methods}

    def accuracy_at(self, method: str, step: int, images: int | None = None) -> dict[str, list[float]]:
        """Held-out task to accuracies, one per seed, of phi after `step` meta-training steps.

        images: one of `more_images`, for the last phi; None: `test.images`.
        """
        seeds = range(self.test.seeds)
        return {
            task.name: [self.accuracy[method, step, at_images(task.name, images), seed] for seed in seeds]
            for task in self.targets
        }

    def final_accuracy(self, images: int | None = None) -> dict[str, dict[str, list[float]]]:
        """Method to held-out task to accuracies of the last phi, and of what is `untrained`; images: as above."""
        last = {name: self.accuracy_at(name, self.train.steps, images) for name in self.methods}
        return {**last, **{name: self.accuracy_at(name, 0, images) for name in self.untrained}}

    # Meta-training

    def meta_train(self, name: str, team: Team, stop: Stop, map_tasks: Callable[..., list]) -> None:
        """Meta-trains one method over the ranks of a team to its last step, from its newest checkpoint if there is one.

        Raises Diverged when a gradient or a parameter is not finite; what was saved before stays.
        """
        setup, kept = self.methods[name], self._checkpoints(name, self.methods[name].tasks, team)
        shares = deal([pixels(task, self.train.size) for task in setup.tasks], team.size)
        others = (team.rank,) if team.rank else ()  # ranks draw apart
        torch.manual_seed(task_seed(self.seed, "meta-train", *others))  # of what networks draw: as after another method
        trainer = self.trainer(name, map_tasks, [setup.tasks[i] for i in shares[team.rank]], team)
        raises = setup.options.get("nonfinite", "raise") == "raise"
        training = Training(
            name,
            trainer,
            kept,
            team,
            tasks=[task.name for task in setup.tasks],
            spread=[[setup.tasks[i].name for i in share] for share in shares],
            steps=self.train.steps,
            snapshot_steps=self.snapshot_steps,
            rates=self.rates(name) if raises else None,
            shown=self.team.is_first,
        )
        self.curves[name], self.snapshots[name] = training.curve, training.snapshots
        found = training.resume() if self.resume else None
        if self.resume and found is None and self.folder.finished:
            raise CheckpointError(
                f"{self.out} holds a finished run, but {kept.path} is gone: delete {FINISHED} there to meta-train "
                f"{name} anew, then resume"
            )
        if self.resume:
            print(f"meta-train {name}: goes on from {found or 'its first step: nothing was saved yet'}", flush=True)
        training.run(stop, self._tensorboard_writer(name) if team.is_first else None)
        if len(setup.tasks) == 1:
            self.bodies[name] = on_cpu(trainer.nets[0].body.state_dict())

    def rates(self, name: str) -> str:
        """What a message about gradients that are not finite says of a method's step sizes."""
        return f"its meta_lr ({self.methods[name].meta_lr}) or the lr ({self.train.lr}) is too large"

    def trainer(
        self, name: str, map_tasks: Callable[..., list], tasks: Sequence[Any] | None = None, team: Team = ALONE
    ) -> MetaTrainer:
        """What meta-trains a method, at its first step; tasks: of this rank of the team, None for all."""
        setup = self.methods[name]
        group = {"process_group": team.group} if team.group is not None else {}
        return MetaTrainer(
            setup.method,
            setup.tasks if tasks is None else tasks,
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
            **{"nonfinite": "raise", **setup.options, **group},
        )

    def _tensorboard_writer(self, name: str) -> Any:
        if not self.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.out / TENSORBOARD / name)

    # Meta-test

    def meta_test(self, stop: Stop, map_tasks: Callable[..., list]) -> None:
        """Fine-tunes every initialization on every target with every seed, as far as that is not done yet.

        Each rank has a share of the runs, and checkpoints of its own: where `stop` is requested it leaves the runs that
        it is in and waits for nobody; raises `Interrupted`.
        """
        phis = {(name, step): phi for name, kept in self.snapshots.items() for step, phi in kept.items()}
        phis |= {(name, 0): phi for name, phi in self.untrained.items()}  # of `scratch` every seed draws its own body
        jobs = self.jobs(phis)
        if self.resume:
            self._load_accuracy()
        team, todo = self.team, [job for job in jobs if job not in self.accuracy]
        cases = {
            at_images(task.name, images): (task, images)
            for task in self.targets
            for images in (None, *self.more_images)
        }
        costs = [pixels(cases[target][0], self.test.size) for _, _, target, _ in todo]
        share = [todo[i] for i in deal(costs, team.size)[team.rank]]
        testers = {
            name: self.tester(*cases[name], check=stop.check)
            for name in dict.fromkeys(target for _, _, target, _ in share)
        }
        kept = self._checkpoints(f"{META_TEST}-{team.rank}" if team.rank else META_TEST, self.targets)
        lock = threading.Lock()

        def work(job: Job) -> None:
            stop.check()  # before a network is made
            method, step, target, seed = job
            accuracy = testers[target].accuracy(phis[method, step], task_seed(self.seed, "meta-test", seed))
            with lock:
                self.accuracy[job] = accuracy
                done = [[*job, value] for job, value in self.accuracy.items()]
                kept.save({ACCURACY: done}, f"{len(done)} of {len(jobs)} runs")
                progress.advance(f"{method} on {target}: {100 * accuracy:.1f} %")

        before = len(jobs) - len(todo)
        with Progress("meta-test", before + len(share), before, unit="run", shown=team.is_first) as progress:
            map_tasks(work, share)
        stop.check()  # now: signals are not looked at while others are waited for
        for found in team.gather(self.accuracy, patiently=True):
            self.accuracy.update(found)

    def _load_accuracy(self) -> None:
        """What was meta-tested before, over however many ranks."""
        if self.team.is_first:
            more = sorted(folder.name for folder in (self.out / CHECKPOINTS).glob(f"{META_TEST}-*"))
            for part in (META_TEST, *more):
                kept = self._checkpoints(part, self.targets)
                kept.load(lambda parts: self.accuracy.update({tuple(job): x for *job, x in parts[ACCURACY]}))
        self.accuracy = self.team.gather(self.accuracy)[0]

    def tester(self, task: Any, images: int | None = None, check: Callable[[], None] = lambda: None) -> MetaTester:
        """What fine-tunes on a held-out task; images: how many, None for `test.images`; check: see `MetaTester`."""
        test = self.test if images is None else replace(self.test, images=images)
        own = {"device": self.device, "precision": self.precision, "check": check}
        return MetaTester(task, test, make_net=self.make_net, **own)

    def jobs(self, phis: Iterable[tuple[str, int]]) -> list[Job]:
        """Runs of the meta-test of these (method, step): all on `test.images`, the last phi on `more_images` too."""
        last = (0, self.train.steps)
        return [
            (method, step, at_images(task.name, images), seed)
            for seed in range(self.test.seeds)
            for images in (None, *self.more_images)
            for task in self.targets
            for method, step in phis
            if images is None or step in last
        ]

    # Files

    def _checkpoints(self, part: str, tasks: Sequence[Any], team: Team = ALONE) -> Checkpoints:
        data = {task.name: self.digests[task.name] for task in tasks}
        return self.folder.checkpoints(part, team, data=data)

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


def checked(
    config: Mapping[str, Any],
    methods: Mapping[str, MethodSetup],
    targets: Sequence[Any],
    train: MetaTrainSettings,
    team: Team = ALONE,
    capture: bool = False,
) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """Whether these arguments of an `Experiment` can run, before it has a folder.

    Returns task to digest, the methods that all ranks train together, and of each rank those that it trains alone.
    Raises ValueError for a method without the held-out images that it needs, for fewer tasks than ranks, and where
    ranks cannot work together.
    """
    tasks = [*(task for setup in methods.values() for task in setup.tasks), *targets]
    digests = {task.name: digest(task) for task in {task.name: task for task in tasks}.values()}
    for name, setup in methods.items():
        check_held_out(name, setup.method, setup.tasks, train)
    together, alone = _spread(methods, train.size, team.size)
    _check_ranks(team, config, digests, capture)
    return digests, together, alone


def _spread(methods: Mapping[str, MethodSetup], size: int | None, ranks: int) -> tuple[list[str], list[list[str]]]:
    """The methods that all ranks train together, and of each rank those that it trains alone; as `checked` raises."""
    if ranks == 1:
        return list(methods), [[]]
    most = max((len(setup.tasks) for setup in methods.values()), default=0)
    enough = max(2, min(ranks, most))  # `finetune` may have fewer tasks than the others
    alone = [name for name, setup in methods.items() if setup.method.one_process or len(setup.tasks) < enough]
    together = [name for name in methods if name not in alone]
    for name in together:
        if (count := len(methods[name].tasks)) < ranks:
            raise ValueError(
                f"{name}: {count} tasks cannot be spread over {ranks} ranks: give torchrun "
                f"--nproc-per-node {count} or fewer"
            )
    costs = [sum(pixels(task, size) for task in methods[name].tasks) for name in alone]
    return together, [[alone[i] for i in share] for share in deal(costs, ranks)]


def _check_ranks(team: Team, config: Mapping[str, Any], digests: Mapping[str, str], capture: bool) -> None:
    """Raises ValueError where ranks cannot work together: of other arguments or data, or with a CUDA graph."""
    if capture and team.size > 1:
        raise ValueError("--capture: ranks agree on the host, which a CUDA graph leaves out; give it to one process")
    told = team.gather({"config": config, "data": digests}, patiently=True)
    for rank, facts in enumerate(told):
        if other := differences(told[0], facts):
            raise ValueError(f"rank {rank} was given something else than rank 0 ({other}): give all ranks the same")


def at_images(target: str, images: int | None) -> str:
    """What a held-out task is called where another number of its images than `test.images` is fine-tuned on."""
    return target if images is None else f"{target}@{images}"


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as another rank can have them."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


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
