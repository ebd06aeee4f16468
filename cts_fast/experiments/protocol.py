"""The image programs: from a command line to runs; `resnet20` and `imagenet` differ in their `Program` alone."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cts_fast.baselines import METHODS
from cts_fast.data import Task
from cts_fast.distributed.launch import Team
from cts_fast.experiments import cli
from cts_fast.experiments.dry_run import rehearsed
from cts_fast.experiments.experiment import Experiment, MethodSetup, checked
from cts_fast.experiments.meta_test import MetaTestSettings
from cts_fast.experiments.meta_train import MetaTrainSettings
from cts_fast.experiments.report import report
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.settings import Preset, halvings, method_of, of_horizons, rate_of, snapshot_steps
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.sweep import Sweep
from cts_fast.experiments.weights import UNTRAINED

PSEUDO_METHODS = ("finetune", *UNTRAINED)
KNOWN_METHODS = (*METHODS, *PSEUDO_METHODS)


@dataclass(frozen=True)
class Program:
    """What an image program is by default.

    module, description: of its command line; preset: the default one of `presets`; untrained: what is always
    meta-tested without meta-training; pretrained: from the arguments to the file of weights that it begins at where
    `--weights` names none, or None.
    """

    module: str
    description: str | None
    out: str
    presets: Mapping[str, Preset]
    preset: str = "quick"
    suite: str = "builtin"
    model: str = "resnet20"
    untrained: tuple[str, ...] = UNTRAINED
    pretrained: Callable[[argparse.Namespace], Path | None] = lambda args: None


def parser(program: Program) -> argparse.ArgumentParser:
    """The command line of an image program."""
    p = cli.new_parser(program.module, program.description)
    cli.add_data_arguments(p, program.presets, program.preset, program.suite)
    cli.add_model_arguments(p, program.model)
    methods_help = (
        f"all, or some of {', '.join(KNOWN_METHODS)}; as reptile@1 at this step size of the meta-update, also beside "
        f"another (default: the preset's; always tested: {' and, with weights, '.join(program.untrained)})"
    )
    p.add_argument("--methods", type=cli.names, metavar="A,B,...", help=methods_help)
    p.add_argument("--tasks", type=cli.names, metavar="A,B,...", help="tasks to meta-train on (default: the suite's)")
    targets_help = "held-out tasks to meta-test on (default: the suite's)"
    p.add_argument("--targets", type=cli.names, metavar="C,D,...", help=targets_help)
    source_help = "what finetune trains on (default: the preset's, or the task with most images)"
    p.add_argument("--source", type=cli.names, metavar="TASK[,TASK]", help=source_help)
    horizon_help = "inner steps per round; several: a run for each, of equally many steps, in a folder each"
    p.add_argument("--horizon", type=cli.counts, metavar="K[,K...]", help=horizon_help)
    p.add_argument("--rounds", type=cli.positive, metavar="M", help="rounds (of several horizons: of the longest)")
    rates_help = "step size of the meta-update, by method"
    p.add_argument("--meta-lr", type=cli.rates, default={}, metavar="A=X,B=Y,...", help=rates_help)
    _add_settings(p)
    cli.add_run_arguments(p, program.out)
    dry_help = (
        "print settings, tasks, the memory of weights, gradients and optimizer (activations, and images on a GPU, come "
        "on top) and an estimate of the time from a few steps, and stop"
    )
    p.add_argument("--dry-run", action="store_true", help=dry_help)
    cli.add_save_every(p)
    cli.add_compute_arguments(p)
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into --out as well")
    return p


def _add_settings(p: argparse.ArgumentParser) -> None:
    """Single settings of a preset."""
    group = p.add_argument_group("instead of the preset's")
    group.add_argument("--size", type=cli.positive, metavar="S", help="side length of all images")
    group.add_argument("--lr", type=cli.number, help="of the inner steps")
    group.add_argument("--batch-size", type=cli.positive, metavar="B", help="of the inner steps")
    held_help = "fraction of training images kept from all inner steps, for methods that need held-out losses"
    group.add_argument("--held-back", type=cli.fraction, metavar="F", help=held_help)
    cli.add_reset_momentum(group)
    points_help = "times that phi is meta-tested along the way: at the end, at half of the steps, a quarter, ..."
    group.add_argument("--points", type=cli.positive, metavar="N", help=points_help)
    images_help = "training images of each held-out task, or all; several: the last phi is tested with each number"
    group.add_argument("--images", type=cli.counts_or_all, metavar="N[,N...]", help=images_help)
    group.add_argument("--test-steps", type=cli.positive, metavar="N", help="fine-tuning steps of the meta-test")
    group.add_argument("--test-seeds", type=cli.positive, metavar="N", help="fine-tuning runs per held-out task")
    group.add_argument("--test-lr", type=cli.number, metavar="LR", help="of the fine-tuning")
    group.add_argument("--test-batch-size", type=cli.positive, metavar="B", help="of the fine-tuning")


def main(program: Program, argv: Sequence[str] | None = None) -> int:
    """Runs an image program; returns the exit status."""
    p = parser(program)
    args = p.parse_args(argv)
    started = time.monotonic()
    if args.list_data:
        return cli.show_data(p, args)
    return cli.run_program(
        p, args, argv, lambda team: prepare(args, program, started, team), lambda work, stop: work.run(stop)
    )


# From arguments to runs


@dataclass(frozen=True)
class PlannedRun:
    """A run before there is a folder for it."""

    config: dict[str, Any]
    methods: Mapping[str, MethodSetup]
    targets: Sequence[Task]
    settings: Mapping[str, Any]  # further arguments of `Experiment`

    def check(self, config: Mapping[str, Any], team: Team) -> None:
        """Raises ValueError where it cannot run over these ranks, which were all given `config`."""
        checked(config, self.methods, self.targets, self.settings["train"], team, self.settings["capture"])

    def experiment(self, out: Path, **folder: Any) -> Experiment:
        """The run in its folder; `folder`: what `Experiment` does with an older run there."""
        return Experiment(out, self.config, self.methods, self.targets, **self.settings, **folder)


class Work(cli.HasFolder, Protocol):
    """What a command asks for."""

    def run(self, stop: Stop) -> None:
        """All of it that is not done yet."""
        ...


@dataclass(frozen=True)
class Single:
    """One run and its report."""

    experiment: Experiment
    started: float

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return self.experiment.folder

    def run(self, stop: Stop) -> None:
        """What is not done of it yet."""
        self.experiment.run(stop)
        report(self.experiment, self.experiment.out, self.started, stop)


def prepare(args: argparse.Namespace, program: Program, started: float, team: Team) -> Work:
    """From arguments to what they ask for; raises ValueError or OSError that says what is wrong with them."""
    if args.dry_run and team.size > 1:
        raise ValueError("--dry-run measures one process: start it without torchrun")
    plans = planned_runs(args, program)
    if args.dry_run:
        return rehearsed(plans, args.out)
    folder = {"resume": args.resume, "overwrite": args.overwrite, "save_every": args.save_every, "team": team}
    if len(plans) == 1:
        return Single(plans[0].experiment(args.out, **folder), started)
    return Sweep(args.out, plans, started, **folder)


def settings_of(args: argparse.Namespace, preset: Preset) -> tuple[list[MetaTrainSettings], MetaTestSettings]:
    """Those of meta-training, one for each horizon, and of the meta-test: the preset's, changed by arguments."""
    both = cli.sizes(args)
    train = dataclasses.replace(preset.train, **both, **cli.meta_train_settings(args))
    test = dataclasses.replace(
        preset.test,
        **both,
        **cli.given(args, steps="test_steps", seeds="test_seeds", lr="test_lr", batch_size="test_batch_size"),
        **({"images": args.images[0]} if args.images else {}),
    )
    return of_horizons(train, args.horizon or [train.horizon]), test


def planned_runs(args: argparse.Namespace, program: Program) -> list[PlannedRun]:
    """The runs asked for, one for each horizon; raises as `prepare` does."""
    preset = program.presets[args.preset]
    trains, test = settings_of(args, preset)
    cli.check_extras("matplotlib", "safetensors", "scipy", "tqdm", *(["tensorboard"] if args.tensorboard else []))
    cli.check_device(args.device)
    if args.capture and torch.device(args.device).type != "cuda":
        raise ValueError(f"--capture makes a CUDA graph, which --device {args.device} has not: give --device cuda")
    if args.weights is None:
        args.weights = program.pretrained(args)
    names = chosen_methods(args, preset)
    untrained = tuple(name for name in UNTRAINED if name in (*program.untrained, *names))
    tasks, targets = cli.choose_tasks(args, test.size if test.size == trains[0].size else None)
    if args.images:
        check_images(args.images, targets)
    model, weights = cli.choose_model(args, (*tasks, *targets), trains[0].size, test.size)
    sources = cli.choose_sources(args.source, preset.sources, tasks)
    methods = method_setups(names, {**preset.meta_lr, **args.meta_lr}, tasks, sources, args.capture)
    about = {
        "suite": args.suite,
        "preset": args.preset,
        "methods": [*methods, *(name for name in untrained if name == "scratch" or weights)],
        "seed": args.seed,
        "precision": args.precision,
        **cli.about_model(model, weights),
        "tasks": [task.name for task in tasks],
        "targets": [task.name for task in targets],
        "source": ",".join(task.name for task in sources) if "finetune" in methods else None,
        "meta_lr": {name: setup.meta_lr for name, setup in methods.items() if name != "finetune"},
        **cli.about_data(args, (*tasks, *targets)),
        **about_fewer_images(test, targets),
    }
    more_images = args.images[1:] if args.images else []
    settings = {
        **{"make_net": model, "weights": weights, "untrained": untrained, "more_images": more_images, "test": test},
        **{name: getattr(args, name) for name in ("seed", "device", "tensorboard", "capture", "streams", "precision")},
    }
    points = halvings(args.points) if args.points else preset.snapshots
    make = partial(PlannedRun, methods=methods, targets=targets)
    return [
        make(
            config={**about, **cli.about_settings(train, test, more_images, snapshots)},
            settings={**settings, "train": train, "snapshots": snapshots},
        )
        for train, snapshots in ((train, snapshot_steps(train, points)) for train in trains)
    ]


def check_images(numbers: Sequence[int | None], targets: Sequence[Task]) -> None:
    """Raises ValueError where a task has fewer images than one of several numbers: two would be the same images."""
    for task in targets if len(numbers) > 1 else ():
        there = len(task.train.labels)
        if over := [number for number in numbers if number is not None and number > there]:
            raise ValueError(
                f"--images {over[0]}: {task.name} has {there:,} training images, and fewer would be compared as if "
                f"they were {over[0]:,}: give numbers up to {there:,}, or leave it out of --targets"
            )


def about_fewer_images(test: MetaTestSettings, targets: Sequence[Task]) -> dict:
    """What a run's config says of held-out tasks that are fine-tuned on all their images, fewer than `test.images`."""
    there = {task.name: len(task.train.labels) for task in targets}
    fewer = {name: count for name, count in there.items() if test.images is not None and count < test.images}
    return {"fewer_images": fewer} if fewer else {}


def chosen_methods(args: argparse.Namespace, preset: Preset) -> list[str]:
    """The methods asked for, each once; raises ValueError for an unknown name, also one in `--meta-lr`."""
    asked_for = args.methods or preset.methods
    if "none" in asked_for and args.weights is None:
        raise ValueError("--methods none: the weights that it tests are missing: give --weights FILE")
    methods = list(KNOWN_METHODS) if asked_for == ["all"] else list(dict.fromkeys(asked_for))
    for name in (*map(method_of, methods), *args.meta_lr):
        if name not in KNOWN_METHODS:
            raise ValueError(f"there is no method {name!r}; there are: {', '.join(KNOWN_METHODS)}, all")
    for name in (*args.meta_lr, *(name for name in methods if "@" in name)):
        if method_of(name) in PSEUDO_METHODS:
            raise ValueError(f"{name}: {method_of(name)} makes no meta-update and takes no step size")
    return methods


def method_setups(
    names: Sequence[str],
    meta_lr: Mapping[str, float],
    tasks: tuple[Task, ...],
    sources: tuple[Task, ...],
    capture: bool,
) -> dict[str, MethodSetup]:
    """What each method meta-trains on and how; raises ValueError for one that cannot run so."""
    setups = {}
    for name in names:
        if name == "finetune" and len(sources) > 1:  # one body and a head for each
            setups[name] = MethodSetup(METHODS["mtl"], sources, 1.0)
        elif name == "finetune":  # plain SGD on one task: phi takes the whole of every step
            setups[name] = MethodSetup(METHODS["no-shift"], sources, 1.0, {"horizon": None})
        elif name not in UNTRAINED:
            setups[name] = MethodSetup(METHODS[method_of(name)], tasks, rate_of(name, meta_lr))
    for name, setup in setups.items() if capture else ():
        if getattr(setup.method, "on_host", False):
            raise ValueError(f"--capture: {name} takes decisions on the host, which a CUDA graph cannot; leave it out")
    return setups
