"""Command lines of the programs: arguments that several of them take, checks of them, and what to type to go on."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from cts_fast.capture import STREAMS
from cts_fast.data import DamagedFile, Task, load_suite
from cts_fast.experiments.checkpoint import SAVE_EVERY, CheckpointError, is_out_of_memory
from cts_fast.experiments.experiment import Diverged
from cts_fast.experiments.files import first_line
from cts_fast.experiments.meta_train import PRECISIONS
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.settings import PRESETS
from cts_fast.experiments.signals import Interrupted, Stop, stop_on_signals


class HasFolder(Protocol):
    """What a program works on: it has a folder for itself."""

    folder: RunFolder


Prepared = TypeVar("Prepared", bound=HasFolder)

# Types of arguments


def names(text: str) -> list[str]:
    """Names with commas between them; at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("give at least one name")
    return found


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """A time, 0 included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def rates(text: str) -> dict[str, float]:
    """METHOD=NUMBER with commas between them; step sizes by method."""
    found = {}
    for part in names(text):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not METHOD=NUMBER") from None
        if not 0 <= found[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: the step size must be finite and not negative")
    return found


# Arguments


def new_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a program: ``python -m module``, described by its docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=layout)


def add_run_arguments(p: argparse.ArgumentParser, out: str, *, seed: int = 0, seed_help: str | None = None) -> None:
    """Of every program: where its results go, what to do with a run that is there already, seed and device."""
    out_help = "folder for all results (default: %(default)s)"
    p.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=out_help)
    p.add_argument("--seed", type=int, default=seed, help=seed_help)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def add_data_arguments(p: argparse.ArgumentParser) -> None:
    """Of every program on images: the suite, and the preset of both phases."""
    p.add_argument("--suite", default="builtin", help="builtin (default: comes with the package) or paper")
    p.add_argument("--data-root", type=Path, metavar="DIR", help="where the suite's data are (paper)")
    preset_help = "settings: quick (default; minutes on two CPU cores), long (up to an hour) or paper"
    p.add_argument("--preset", choices=PRESETS, default="quick", help=preset_help)


def add_save_every(p: argparse.ArgumentParser) -> None:
    """Of programs that train: how often they save."""
    every_help = (
        f"between checkpoints; 0 saves after every step (default: {SAVE_EVERY:g}, and longer where saving would take "
        "more than 2 %% of the time)"
    )
    p.add_argument("--save-every", type=seconds, metavar="SECONDS", help=every_help)


def add_compute_arguments(p: argparse.ArgumentParser) -> None:
    """How networks compute on the device."""
    p.add_argument("--capture", action="store_true", help="replay each training step as one CUDA graph")
    p.add_argument("--streams", type=positive, default=STREAMS, metavar="N", help="of a captured step (default: 8)")
    precision_help = "of the networks' passes: fp32 (default) or bf16 autocast"
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help=precision_help)


def given(args: argparse.Namespace, **arguments: str) -> dict:
    """Setting to value, of the settings whose arguments were given: ``given(args, steps="test_steps")``."""
    values = {setting: getattr(args, argument) for setting, argument in arguments.items()}
    return {setting: value for setting, value in values.items() if value is not None}


# Checks; each raises ValueError that says what is wrong


def check_extras(*modules: str) -> None:
    """Modules of the extra "examples" that are missing: better now than after the training."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'cts-fast[examples]'")


def check_device(name: str) -> None:
    """A device on which tensors cannot be made."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None


def choose_tasks(args: argparse.Namespace) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks to meta-train on and those to meta-test on, by `--tasks` and `--targets` or by their role."""
    wanted = None if args.tasks is None or args.targets is None else [*args.tasks, *args.targets]
    suite = load_suite(args.suite, args.data_root, wanted)
    for name in (*(args.tasks or ()), *(args.targets or ())):
        if name not in suite:
            raise ValueError(f"suite {args.suite!r} has no task {name!r}; it has: {', '.join(suite)}")

    def chosen(asked_for: Sequence[str] | None, role: str) -> tuple[Task, ...]:
        if asked_for is None:
            return tuple(task for task in suite.values() if task.role == role)
        return tuple(suite[name] for name in dict.fromkeys(asked_for))

    tasks, targets = chosen(args.tasks, "train"), chosen(args.targets, "target")
    both = {task.name for task in tasks} & {task.name for task in targets}
    if both:
        raise ValueError(
            f"{', '.join(sorted(both))}: a task is either meta-trained on or held out; "
            "take it out of --tasks or --targets"
        )
    return tasks, targets


def choose_source(name: str | None, tasks: Sequence[Task]) -> Task:
    """The task that `finetune` trains on; by default the one with most images."""
    if name is None:
        return max(tasks, key=lambda task: len(task.train.labels))
    for task in tasks:
        if task.name == name:
            return task
    known = ", ".join(task.name for task in tasks)
    raise ValueError(f"--source {name}: not one of the tasks to meta-train on: {known}")


# The end of a program


def run_program(
    p: argparse.ArgumentParser,
    out: Path,
    argv: Sequence[str] | None,
    prepare: Callable[[], Prepared],
    run: Callable[[Prepared, Stop], None],
    at_once: bool = False,
) -> int:
    """All of a program but its arguments; returns the exit status.

    0: done; 1: a fault of the run (gradients that are not finite, no memory); 2: of what it was given (arguments,
    files, a folder, a disk); 128 + n: stopped by signal n. A fault is told in one line. prepare: from arguments to what
    `run` works on, whose folder is closed at the end; at_once: `run` never asks whether to stop.
    """
    prepared = None
    try:
        with stop_on_signals(at_once) as stop:
            try:
                prepared = prepare()
            except (ValueError, DamagedFile) as error:
                p.exit(2, f"{p.prog}: error: {error}\n")
            run(prepared, stop)
    except (CheckpointError, DamagedFile, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except (Diverged, MemoryError, RuntimeError) as error:
        if not isinstance(error, Diverged) and not is_out_of_memory(error):
            raise
        text = str(error) if isinstance(error, Diverged) else f"out of memory: {first_line(error)}"
        p.exit(1, f"{p.prog}: error: {text}\n")
    except Interrupted as stopped:
        with contextlib.suppress(OSError):  # a hang-up may have closed the output
            note = f"\nstopped; everything so far is in {out}. To go on:\n  {resume_command(p, argv)}"
            print(note, file=sys.stderr)
        return stopped.status
    finally:
        if prepared is not None:
            prepared.folder.close()
    return 0


def resume_command(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    """The command that goes on with this run of a program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join([*p.prog.split(), *arguments, "--resume"])
