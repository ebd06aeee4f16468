"""Meta-train a ResNet20 on many image tasks, then fine-tune it on tasks that it has never seen.

    python -m cts_fast.examples.resnet20

trains an initialization with continual trajectory shifting and one with Reptile, for equally many steps from the same
start on the same batches, fine-tunes both and a random initialization on held-out tasks, and prints a table.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cts_fast.baselines import METHODS
from cts_fast.capture import STREAMS
from cts_fast.data import DamagedFile, Task, load_suite
from cts_fast.experiments.experiment import Entry, Experiment
from cts_fast.experiments.meta_train import PRECISIONS
from cts_fast.experiments.report import report
from cts_fast.experiments.run_folder import CheckpointError, Interrupted, first_line, stop_on_signals
from cts_fast.experiments.settings import PRESETS

PSEUDO_METHODS = ("finetune", "scratch")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m cts_fast.examples.resnet20",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = (*METHODS, *PSEUDO_METHODS)
    p.add_argument("--suite", default="builtin", help="builtin (default: comes with the package) or paper")
    p.add_argument("--data-root", type=Path, metavar="DIR", help="where the suite's data are (paper)")
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="settings: quick (default; minutes on two CPU cores) or paper",
    )
    p.add_argument(
        "--methods",
        type=_names,
        default=["cts", "reptile"],
        metavar="A,B,...",
        help=f"all, or some of {', '.join(names)} (default: cts,reptile; scratch is always tested)",
    )
    p.add_argument("--tasks", type=_names, metavar="A,B,...", help="tasks to meta-train on (default: the suite's)")
    p.add_argument(
        "--targets", type=_names, metavar="C,D,...", help="held-out tasks to meta-test on (default: the suite's)"
    )
    p.add_argument(
        "--source", metavar="TASK", help="the task that finetune trains on (default: the one with most images)"
    )
    p.add_argument("--horizon", type=_positive, metavar="K", help="inner steps per round")
    p.add_argument("--rounds", type=_positive, metavar="M", help="rounds")
    p.add_argument(
        "--meta-lr", type=_rates, default={}, metavar="A=X,B=Y,...", help="step size of the meta-update, by method"
    )
    p.add_argument("--test-steps", type=_positive, metavar="N", help="fine-tuning steps of the meta-test")
    p.add_argument("--test-seeds", type=_positive, metavar="N", help="fine-tuning runs per held-out task")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/resnet20"),
        metavar="DIR",
        help="folder for all results (default: runs/resnet20)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--capture", action="store_true", help="replay each training step as one CUDA graph")
    p.add_argument("--streams", type=_positive, default=STREAMS, metavar="N", help="of a captured step (default: 8)")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the networks' passes: fp32 (default) or bf16 autocast",
    )
    add_folder_arguments(p)
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into --out as well")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    started = time.monotonic()
    try:
        experiment = prepare(args)
    except (ValueError, OSError, DamagedFile) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    try:
        with stop_on_signals() as stop:
            experiment.run(stop)
            report(experiment, args.out, started, stop)
    except (CheckpointError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except Interrupted as stopped:
        with contextlib.suppress(OSError):  # a hang-up may have closed the output
            print(
                f"\nstopped; everything so far is in {args.out}. To go on:\n  {resume_command(argv)}", file=sys.stderr
            )
        return stopped.status
    return 0


def prepare(args: argparse.Namespace) -> Experiment:
    """From arguments to an experiment; raises ValueError or OSError that says what is wrong with them."""
    preset = PRESETS[args.preset]
    changes = {key: value for key in ("horizon", "rounds") if (value := getattr(args, key)) is not None}
    train = dataclasses.replace(preset.train, **changes)
    test_changes = {"steps": args.test_steps, "seeds": args.test_seeds}
    test = dataclasses.replace(preset.test, **{key: value for key, value in test_changes.items() if value is not None})
    check_extras("matplotlib", "safetensors", "scipy", "tqdm", *(["tensorboard"] if args.tensorboard else []))
    check_device(args.device)
    if args.capture and torch.device(args.device).type != "cuda":
        raise ValueError(f"--capture makes a CUDA graph, which --device {args.device} has not: give --device cuda")

    known = (*METHODS, *PSEUDO_METHODS)
    methods = list(known) if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    for name in (*methods, *args.meta_lr):
        if name not in known:
            raise ValueError(f"there is no method {name!r}; there are: {', '.join(known)}, all")
    meta_lr = {**preset.meta_lr, **args.meta_lr}

    tasks, targets = choose_tasks(args)
    source = choose_source(args.source, tasks)
    entries = {}
    for name in methods:
        if name == "finetune":  # plain SGD on one task: phi takes the whole of every step
            entries[name] = Entry(METHODS["no-shift"], (source,), 1.0, {"horizon": None})
        elif name != "scratch":
            if name not in meta_lr:
                raise ValueError(f"the preset has no meta_lr for {name!r}: give --meta-lr {name}=X")
            entries[name] = Entry(METHODS[name], tasks, meta_lr[name])
    for name, entry in entries.items() if args.capture else ():
        if getattr(entry.method, "on_host", False):
            raise ValueError(f"--capture: {name} takes decisions on the host, which a CUDA graph cannot; leave it out")
    config = {
        "suite": args.suite,
        "preset": args.preset,
        "methods": [*entries, "scratch"],
        "seed": args.seed,
        "precision": args.precision,
        "tasks": [task.name for task in tasks],
        "targets": [task.name for task in targets],
        "source": source.name if "finetune" in entries else None,
        "meta_lr": {name: entry.meta_lr for name, entry in entries.items() if name != "finetune"},
        "meta_train": dataclasses.asdict(train),
        "meta_test": json.loads(json.dumps(dataclasses.asdict(test))),
    }
    points = min(preset.snapshots, train.steps)
    return Experiment(
        args.out,
        config,
        entries,
        targets,
        train=train,
        test=test,
        seed=args.seed,
        device=args.device,
        snapshots=[round(train.steps * (i + 1) / points) for i in range(points)],
        resume=args.resume,
        overwrite=args.overwrite,
        tensorboard=args.tensorboard,
        capture=args.capture,
        streams=args.streams,
        precision=args.precision,
    )


def choose_tasks(args: argparse.Namespace) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks to meta-train on and those to meta-test on, by `--tasks` and `--targets` or by their role."""
    wanted = None if args.tasks is None or args.targets is None else [*args.tasks, *args.targets]
    suite = load_suite(args.suite, args.data_root, wanted)
    chosen = []
    for names, role in ((args.tasks, "train"), (args.targets, "target")):
        for name in names or ():
            if name not in suite:
                raise ValueError(f"suite {args.suite!r} has no task {name!r}; it has: {', '.join(suite)}")
        chosen.append(
            tuple(suite[name] for name in dict.fromkeys(names))
            if names is not None
            else tuple(task for task in suite.values() if task.role == role)
        )
    tasks, targets = chosen
    both = {task.name for task in tasks} & {task.name for task in targets}
    if both:
        raise ValueError(
            f"{', '.join(sorted(both))}: a task is either meta-trained on or held out; "
            "take it out of --tasks or --targets"
        )
    return tasks, targets


def choose_source(name: str | None, tasks: Sequence[Task]) -> Task:
    """The task that `finetune` trains on."""
    if name is None:
        return max(tasks, key=lambda task: len(task.train.labels))
    for task in tasks:
        if task.name == name:
            return task
    raise ValueError(
        f"--source {name}: not one of the tasks to meta-train on: {', '.join(task.name for task in tasks)}"
    )


def check_extras(*modules: str) -> None:
    """Raises ValueError if a module of the extra "examples" is missing: better now than after the training."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'cts-fast[examples]'")


def check_device(name: str) -> None:
    """Raises ValueError if tensors cannot be made on the device."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None


def resume_command(argv: Sequence[str] | None, module: str = "cts_fast.examples.resnet20") -> str:
    """The command that goes on with this run of a program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["python", "-m", module, *arguments, "--resume"])


def add_folder_arguments(p: argparse.ArgumentParser) -> None:
    """What to do with a run that is in --out already."""
    group = p.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("give at least one name")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rates(text: str) -> dict[str, float]:
    rates = {}
    for part in _names(text):
        name, _, value = part.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not METHOD=NUMBER") from None
        if not 0 <= rates[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: the step size must be finite and not negative")
    return rates


if __name__ == "__main__":
    sys.exit(main())
