"""Meta-train a ResNet20 on many image tasks, then fine-tune it on tasks that it has never seen.

    python -m cts_fast.examples.resnet20

trains an initialization with continual trajectory shifting and one with Reptile, for equally many steps from the same
start on the same batches, fine-tunes both and a random initialization on held-out tasks, and prints a table.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from cts_fast.baselines import METHODS
from cts_fast.data import Task
from cts_fast.distributed.launch import Team
from cts_fast.experiments import cli
from cts_fast.experiments.experiment import Experiment, MethodSetup
from cts_fast.experiments.report import report
from cts_fast.experiments.settings import PRESETS, UNTRAINED, method_of, rate_of, snapshot_steps
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.weights import untrained

MODULE = "cts_fast.examples.resnet20"
PSEUDO_METHODS = ("finetune", *UNTRAINED)
KNOWN_METHODS = (*METHODS, *PSEUDO_METHODS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.new_parser(MODULE, __doc__)
    cli.add_data_arguments(p)
    cli.add_model_arguments(p)
    methods_help = (
        f"all, or some of {', '.join(KNOWN_METHODS)}; as reptile@1 at this step size of the meta-update, also beside "
        "another (default: the preset's: cts,reptile in quick; scratch is always tested, and with --weights none)"
    )
    p.add_argument("--methods", type=cli.names, metavar="A,B,...", help=methods_help)
    p.add_argument("--tasks", type=cli.names, metavar="A,B,...", help="tasks to meta-train on (default: the suite's)")
    targets_help = "held-out tasks to meta-test on (default: the suite's)"
    p.add_argument("--targets", type=cli.names, metavar="C,D,...", help=targets_help)
    source_help = "the task that finetune trains on (default: the one with most images)"
    p.add_argument("--source", metavar="TASK", help=source_help)
    p.add_argument("--horizon", type=cli.positive, metavar="K", help="inner steps per round")
    p.add_argument("--rounds", type=cli.positive, metavar="M", help="rounds")
    rates_help = "step size of the meta-update, by method"
    p.add_argument("--meta-lr", type=cli.rates, default={}, metavar="A=X,B=Y,...", help=rates_help)
    p.add_argument("--test-steps", type=cli.positive, metavar="N", help="fine-tuning steps of the meta-test")
    p.add_argument("--test-seeds", type=cli.positive, metavar="N", help="fine-tuning runs per held-out task")
    cli.add_run_arguments(p, "runs/resnet20")
    cli.add_save_every(p)
    cli.add_compute_arguments(p)
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into --out as well")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    started = time.monotonic()
    if args.list_data:
        return cli.show_data(p, args)

    def run(experiment: Experiment, stop: Stop) -> None:
        experiment.run(stop)
        report(experiment, args.out, started, stop)

    return cli.run_program(p, args, argv, partial(prepare, args), run)


def prepare(args: argparse.Namespace, team: Team) -> Experiment:
    """From arguments to an experiment; raises ValueError or OSError that says what is wrong with them."""
    preset = PRESETS[args.preset]
    train = dataclasses.replace(preset.train, **cli.given(args, horizon="horizon", rounds="rounds"))
    test = dataclasses.replace(preset.test, **cli.given(args, steps="test_steps", seeds="test_seeds"))
    cli.check_extras("matplotlib", "safetensors", "scipy", "tqdm", *(["tensorboard"] if args.tensorboard else []))
    cli.check_device(args.device)
    if args.capture and torch.device(args.device).type != "cuda":
        raise ValueError(f"--capture makes a CUDA graph, which --device {args.device} has not: give --device cuda")
    names = chosen_methods(args)
    tasks, targets = cli.choose_tasks(args)
    model, weights = cli.choose_model(args, (*tasks, *targets), train.size, test.size)
    source = cli.choose_source(args.source, tasks)
    methods = method_setups(names, {**preset.meta_lr, **args.meta_lr}, tasks, source, args.capture)
    config = {
        "suite": args.suite,
        "preset": args.preset,
        "methods": [*methods, *untrained(weights)],
        "seed": args.seed,
        "precision": args.precision,
        **cli.about_model(model, weights),
        "tasks": [task.name for task in tasks],
        "targets": [task.name for task in targets],
        "source": source.name if "finetune" in methods else None,
        "meta_lr": {name: setup.meta_lr for name, setup in methods.items() if name != "finetune"},
        "meta_train": dataclasses.asdict(train),
        "meta_test": json.loads(json.dumps(dataclasses.asdict(test))),
        **cli.about_data(args, (*tasks, *targets)),
    }
    return Experiment(
        args.out,
        config,
        methods,
        targets,
        make_net=model,
        weights=weights,
        train=train,
        test=test,
        snapshots=snapshot_steps(train, preset.snapshots),
        tensorboard=args.tensorboard,
        seed=args.seed,
        device=args.device,
        resume=args.resume,
        overwrite=args.overwrite,
        save_every=args.save_every,
        capture=args.capture,
        streams=args.streams,
        precision=args.precision,
        team=team,
    )


def chosen_methods(args: argparse.Namespace) -> list[str]:
    """The methods asked for, each once; raises ValueError for an unknown name, also one in `--meta-lr`."""
    asked_for = args.methods or PRESETS[args.preset].methods
    if "none" in asked_for and args.weights is None:
        raise ValueError("--methods none: the weights that it tests are missing: give --weights FILE")
    methods = list(KNOWN_METHODS) if asked_for == ["all"] else list(dict.fromkeys(asked_for))
    for name in (*map(method_of, methods), *args.meta_lr):
        if name not in KNOWN_METHODS:
            raise ValueError(f"there is no method {name!r}; there are: {', '.join(KNOWN_METHODS)}, all")
    for name in methods:
        if name not in PSEUDO_METHODS and method_of(name) in PSEUDO_METHODS:
            raise ValueError(f"{name}: {method_of(name)} makes no meta-update and takes no step size")
    return methods


def method_setups(
    names: Sequence[str], meta_lr: Mapping[str, float], tasks: tuple[Task, ...], source: Task, capture: bool
) -> dict[str, MethodSetup]:
    """What each method meta-trains on and how; raises ValueError for one that cannot run so."""
    setups = {}
    for name in names:
        if name == "finetune":  # plain SGD on one task: phi takes the whole of every step
            setups[name] = MethodSetup(METHODS["no-shift"], (source,), 1.0, {"horizon": None})
        elif name not in UNTRAINED:
            setups[name] = MethodSetup(METHODS[method_of(name)], tasks, rate_of(name, meta_lr))
    for name, setup in setups.items() if capture else ():
        if getattr(setup.method, "on_host", False):
            raise ValueError(f"--capture: {name} takes decisions on the host, which a CUDA graph cannot; leave it out")
    return setups


if __name__ == "__main__":
    sys.exit(main())
