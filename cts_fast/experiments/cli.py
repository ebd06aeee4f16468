"""Command lines of the programs: arguments that several of them take, checks of them, and what to type to go on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from cts_fast.capture import STREAMS
from cts_fast.data import DamagedFile, Storage, Task, load_suite, task_roles
from cts_fast.data.cache import FOLDER as CACHE
from cts_fast.data.cache import LIMIT
from cts_fast.data.paper.suite import BY_NAME, checked_root, listing
from cts_fast.data.suite import REGISTERED
from cts_fast.distributed import RankError
from cts_fast.distributed.launch import ALONE, TIMEOUT, Team, launched
from cts_fast.experiments.checkpoint import SAVE_EVERY, CheckpointError, is_out_of_memory
from cts_fast.experiments.console import allow_any_output
from cts_fast.experiments.files import first_line
from cts_fast.experiments.meta_test import MetaTestSettings
from cts_fast.experiments.meta_train import PRECISIONS, MetaTrainSettings
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.settings import PRESETS, Preset
from cts_fast.experiments.signals import Interrupted, Stop, stop_on_signals
from cts_fast.experiments.training import Diverged
from cts_fast.experiments.weights import Weights, read_weights
from cts_fast.models import by_name
from cts_fast.models.by_name import Model


class HasFolder(Protocol):
    """What a program works on: it has a folder for itself."""

    @property
    def folder(self) -> RunFolder:
        """Closed at the end."""
        ...


Prepared = TypeVar("Prepared", bound=HasFolder)

DATA_EXTRAS = ("PIL", "numpy", "scipy", "torchvision", "tqdm")  # what reading data sets needs

LONGEST_WAIT = 30 * 24 * 3600.0  # seconds

# Types of arguments


def names(text: str) -> list[str]:
    """Names with commas between them; at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("give at least one name")
    return found


def seconds(text: str) -> float:
    """A time above 0, up to thirty days."""
    value = number(text)
    if not 0 < value <= LONGEST_WAIT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0 and up to {LONGEST_WAIT:g} seconds")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def number(text: str) -> float:
    """A finite number, 0 included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0 on")
    return value


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    if (value := number(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value


def counts(text: str) -> list[int]:
    """Whole numbers above 0 with commas between them, each once."""
    return list(dict.fromkeys(map(positive, names(text))))


def counts_or_all(text: str) -> list[int | None]:
    """The same, or "all" alone: [None]."""
    return [None] if text == "all" else [*counts(text)]


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


class Parser(argparse.ArgumentParser):
    """Speaks once for all ranks, which have the same arguments."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched().is_first:
            super()._print_message(message, file)


def new_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a program: ``python -m module``, described by its docstring."""
    allow_any_output()  # a description has letters of its own
    layout = argparse.RawDescriptionHelpFormatter
    return Parser(  # options in full: the command to go on with is made of them
        prog=f"python -m {module}", description=description, formatter_class=layout, allow_abbrev=False
    )


def add_run_arguments(p: argparse.ArgumentParser, out: str, *, seed: int = 0, seed_help: str | None = None) -> None:
    """Of every program: where its results go, what to do with a run that is there already, seed and device."""
    out_help = "folder for all results (default: %(default)s)"
    p.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=out_help)
    p.add_argument("--seed", type=int, default=seed, help=seed_help)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def add_data_arguments(
    p: argparse.ArgumentParser,
    presets: Mapping[str, Preset] = PRESETS,
    preset: str = "quick",
    suite: str = "builtin",
) -> None:
    """Of every program on images: the suite and its data, and the preset of both phases."""
    suite_help = (
        "builtin (comes with the package), paper, imagenet, folder (every subfolder of --data-root is a task), or "
        "several with commas between them (default: %(default)s)"
    )
    p.add_argument("--suite", default=suite, metavar="NAME", help=suite_help)
    p.add_argument("--data-root", type=Path, metavar="DIR", help="where the suite's data are")
    p.add_argument(
        "--list-data", action="store_true", help="say which of the paper's data are in --data-root, and stop"
    )
    p.add_argument("--download", action="store_true", help="fetch data sets that are missing into --data-root")
    p.add_argument("--partial", action="store_true", help="take data sets of which images are missing as they are")
    held_help = "for tuning: fine-tuned nets are tested on a seeded tenth of the training images, never on test images"
    p.add_argument("--validation", action="store_true", help=held_help)
    cache_help = f"where decoded images are kept (default: {CACHE} in --data-root)"
    p.add_argument("--cache-dir", type=Path, metavar="DIR", help=cache_help)
    limit_help = "tasks with more decoded images than this are not kept but decoded for each batch (default: 20)"
    p.add_argument("--cache-limit", type=number, default=LIMIT / 1e9, metavar="GB", help=limit_help)
    preset_help = "settings: quick (minutes on two CPU cores), long (longer) or paper (default: %(default)s)"
    p.add_argument("--preset", choices=presets, default=preset, help=preset_help)


def add_save_every(p: argparse.ArgumentParser) -> None:
    """Of programs that train: how often they save, and how long their ranks wait for each other."""
    every_help = (
        f"between checkpoints; 0 saves after every step (default: {SAVE_EVERY:g}, and longer where saving would take "
        "more than 2 %% of the time)"
    )
    p.add_argument("--save-every", type=number, metavar="SECONDS", help=every_help)
    timeout_help = "under torchrun: how long a rank waits for one that trains with it (default: %(default)g)"
    p.add_argument("--rank-timeout", type=seconds, default=TIMEOUT, metavar="SECONDS", help=timeout_help)


def add_compute_arguments(p: argparse.ArgumentParser) -> None:
    """How networks compute on the device."""
    p.add_argument("--capture", action="store_true", help="replay each training step as one CUDA graph")
    p.add_argument("--streams", type=positive, default=STREAMS, metavar="N", help="of a captured step (default: 8)")
    precision_help = "of the networks' passes: fp32 (default) or bf16 autocast"
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help=precision_help)


def add_reset_momentum(p: Any) -> None:
    """Of every program that meta-trains; p: a parser, or a group of one."""
    reset_help = "whether a reset of the learners clears their momentum too"
    p.add_argument("--reset-momentum", action=argparse.BooleanOptionalAction, help=reset_help)


def given(args: argparse.Namespace, **arguments: str) -> dict:
    """Setting to value, of the settings whose arguments were given: ``given(args, steps="test_steps")``."""
    values = {setting: getattr(args, argument) for setting, argument in arguments.items()}
    return {setting: value for setting, value in values.items() if value is not None}


def meta_train_settings(args: argparse.Namespace) -> dict:
    """The settings of meta-training whose arguments were given, but for horizon and size."""
    names = ("rounds", "lr", "batch_size", "held_back", "reset_momentum")
    return given(args, **dict(zip(names, names, strict=True)))


def sizes(args: argparse.Namespace) -> dict[str, int | None]:
    """Settings that `--size` changes: the usual padding belongs to it, a preset's own to the preset's size."""
    return {"size": args.size, "padding": None} if args.size else {}


def add_model_arguments(p: argparse.ArgumentParser, model: str = "resnet20") -> None:
    """Of every program on images: the network, and weights to begin at."""
    model_help = (
        "network: resnet20, resnet18 or another of torchvision's classifiers, or module:function, which is called with "
        "the number of classes (default: %(default)s)"
    )
    p.add_argument("--model", default=model, metavar="NAME", help=model_help)
    weights_help = "state dict (.safetensors, .pt) to begin meta-training at; meta-tested as `none`, too"
    p.add_argument("--weights", type=Path, metavar="FILE", help=weights_help)


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


# Data


def storage(args: argparse.Namespace, size: int | None) -> Storage:
    """How images are held, by the arguments; `size`: the preset's."""
    return Storage(size, args.cache_dir, args.cache_limit * 1e9, args.partial, args.download)


def choose_tasks(args: argparse.Namespace, size: int | None) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks to meta-train on and those to meta-test on, by `--tasks` and `--targets` or by their role.

    size: at which images in files are decoded; None: each task's own.
    What is asked for as a target is not meta-trained on, unless `--tasks` asks for it too, which is refused.
    """
    if args.suite != "builtin":
        check_extras(*DATA_EXTRAS)
    roles = task_roles(args.suite, args.data_root)
    targets = chosen_names(args.targets, roles, "target")
    held = set(args.targets or ())
    tasks = chosen_names(args.tasks, {name: role for name, role in roles.items() if name not in held}, "train")
    both = sorted({*tasks} & {*targets})
    if both:
        raise ValueError(
            f"{', '.join(both)}: a task is either meta-trained on or held out; take it out of --tasks or --targets"
        )
    loaded = load_tasks(args, [*tasks, *targets], size)
    held_out = loaded[len(tasks) :]
    return loaded[: len(tasks)], tuple(task.validation() for task in held_out) if args.validation else held_out


def check_places(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder of ours among those that are tasks."""
    if "folder" not in args.suite.split(",") or args.data_root is None:
        return
    root = Path(args.data_root).resolve()
    for option, place in (("--cache-dir", args.cache_dir), ("--out", args.out)):
        if place is None or not place.resolve().is_relative_to(root):
            continue
        below = place.resolve().relative_to(root).parts
        if not below or not below[0].startswith("."):  # hidden folders are no tasks
            raise ValueError(f"{option} {place} lies in the data root {root}, whose folders are tasks: choose another")


def chosen_names(asked_for: Sequence[str] | None, roles: Mapping[str, str], role: str) -> list[str]:
    """Names asked for, or else those of the role."""
    names = list(dict.fromkeys(asked_for)) if asked_for else [name for name, its in roles.items() if its == role]
    if not names:
        argument = {"train": "--tasks", "target": "--targets"}[role]
        raise ValueError(f"no task to {'hold out' if role == 'target' else 'meta-train on'}: give {argument} A,B,...")
    return names


def load_tasks(args: argparse.Namespace, names: Sequence[str], size: int | None) -> tuple[Task, ...]:
    """Tasks of the suite by name; raises ValueError for one that it has not."""
    check_places(args)
    return tuple(load_suite(args.suite, args.data_root, names, storage(args, size)).values())


def about_data(args: argparse.Namespace, tasks: Sequence[Task]) -> dict:
    """What a run's config says of data: images of each task that does not come with the package; whether it tunes."""
    about: dict = {"validation": True} if args.validation else {}
    if args.suite != "builtin":
        about["images"] = {task.name: [len(task.train), len(task.test)] for task in tasks}
        about["pixels"] = {task.name: list(task.train.images.shape[-2:]) for task in tasks}
    return about


def about_settings(
    train: MetaTrainSettings, test: MetaTestSettings, more_images: Sequence[int] = (), snapshots: Sequence[int] = ()
) -> dict:
    """What a run's config says of both phases: every constant, those that no argument changes as well.

    snapshots: steps at which phi is kept, beside the last; more_images: as in `Experiment`.
    """
    return {
        "meta_train": {
            **dataclasses.asdict(train),
            "snapshots": sorted({*snapshots, train.steps}),
            **{"steps": train.steps, "nesterov": False, "reset_heads": False, "reset_statistics": False},
        },
        "meta_test": {
            **json.loads(json.dumps(dataclasses.asdict(test))),
            **({"more_images": list(more_images)} if more_images else {}),
            **{"nesterov": test.momentum > 0, "new_head": True, "new_statistics": True},
        },
    }


def list_data(args: argparse.Namespace) -> str:
    """What `--list-data` prints: a line for every data set of the paper, and what to do about those not found whole."""
    check_extras(*DATA_EXTRAS)
    names = [*(args.tasks or ()), *(getattr(args, "targets", None) or ())]  # not every program has targets
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"there is no data set {unknown[0]!r}; there are: {', '.join(BY_NAME)}")
    rows = list(listing(checked_root(args.data_root, "paper"), names or None, storage(args, None)))
    lines = [f"{'data set':16} {'state':8} training / test images / classes"]
    lines += [f"{name:16} {state:8} {counts}" for name, state, counts, _ in rows]
    lines += [f"\n{name}: {remedy}" for name, _, _, remedy in rows if remedy]
    wanted = [name for name, state, _, remedy in rows if state == "missing" and "--download" in remedy]
    if wanted:
        command = ["python", "-m", "cts_fast.examples.resnet20", "--list-data", "--data-root", str(args.data_root)]
        lines.append(f"\nTo fetch them: {shlex.join([*command, '--tasks', ','.join(wanted), '--download'])}")
    return "\n".join(lines)


def show_data(p: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """All of a program that was asked to list data; returns the exit status."""
    try:
        if launched().is_first:
            print(list_data(args))
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    return 0


def choose_sources(names: Sequence[str] | None, usual: Sequence[str], tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks that `finetune` trains on: those of these names, the usual ones, or the one with most images."""
    by_name = {task.name: task for task in tasks}
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise ValueError(f"--source {unknown[0]}: not one of the tasks to meta-train on: {', '.join(by_name)}")
    found = tuple(by_name[name] for name in dict.fromkeys(names or usual) if name in by_name)
    return found or (max(tasks, key=lambda task: len(task.train.labels)),)


# Networks


def choose_model(args: argparse.Namespace, tasks: Sequence[Task], *sizes: int | None) -> tuple[Model, Weights | None]:
    """The network by `--model`, tried on images as large as the tasks' at these sizes, and what `--weights` holds.

    Raises ValueError for a model or a file that cannot be used.
    """
    own = [(images.shape[-2], images.shape[-1]) for images in (task.train.images for task in tasks)]
    batches = [getattr(args, name, None) or 2 for name in ("batch_size", "test_batch_size")]  # no preset has one of 1
    wanted = [(size, size) if size else shape for size in sizes for shape in own]
    model = by_name.model(args.model, wanted, min(2, *batches))  # those of two images stand for all larger ones
    if args.weights is None:
        return model, None
    check_extras("safetensors")
    weights = read_weights(args.weights, model)
    notes = [f"{', '.join(weights.left_out)} left out: heads are each task's own"] if weights.left_out else []
    notes += [] if weights.statistics else ["no batch-norm statistics in it: they begin anew"]
    print(f"{args.weights}: {'; '.join(notes or ['all of the body'])}", flush=True)
    return model, weights


def about_model(model: Model, weights: Weights | None) -> dict:
    """What a run's config says of the network and of the weights that it begins at."""
    return {"model": model.name, **({"weights": weights.sha256} if weights else {})}


# The end of a program


def run_program(
    p: argparse.ArgumentParser,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    prepare: Callable[[Team], Prepared],
    run: Callable[[Prepared, Stop], None],
    at_once: bool = False,
) -> int:
    """All of a program but its arguments; returns the exit status.

    0: done; 1: a fault of the run (gradients that are not finite, no memory, a rank that is gone); 2: of what it was
    given (arguments, files, a folder, a disk); 128 + n: stopped by signal n. A fault is one line. Ranks end together:
    the first one that cannot go on says why, and the others end with its status.

    prepare: from arguments, and the ranks that torchrun started, to what `run` works on, whose folder is closed at the
    end; `args.device` is this rank's by then. at_once: `run` never asks whether to stop, and knows no ranks.
    """
    team, prepared = launched(), None
    with stop_on_signals() as early:  # what comes between the phases, or while ranks end
        try:
            with stop_on_signals(at_once=True):  # data are fetched and decoded there, and nobody asks in between
                team.meet(args.device, getattr(args, "rank_timeout", TIMEOUT))
                args.device = team.device
                if at_once and team.size > 1:
                    raise ValueError("this program runs in one process: start it without torchrun")
                with shown_by_the_first(team):
                    prepared = prepare(team)
            with stop_on_signals(at_once) as stop, shown_by_the_first(team):
                early.check()  # `stop` takes the signals that come later
                run(prepared, stop)
                team.gather(None, patiently=True)  # all are through: a launch goes on together or not at all
            team.close()
            return 0
        except Interrupted as stopped:
            status, failed = stopped.status, False
            text = "\nstopped before the run began\n"
            if prepared is not None:
                text = f"\nstopped; what was saved is in {args.out}. To go on:\n  {resume_command(p, argv, team)}\n"
        except Exception as error:
            found = fault(error, team, preparing=prepared is None)
            if found is None:
                team.end(1)
                raise
            status, failed, text = found[0], True, f"{p.prog}: error: {found[1]}\n"
        finally:
            if prepared is not None:
                prepared.folder.close()
        first, status = team.end(status)
        if first == team.rank:
            with contextlib.suppress(OSError):  # a hang-up may have closed the output
                sys.stderr.write(text)
    if failed:
        p.exit(status)
    return status


def fault(error: Exception, team: Team, preparing: bool) -> tuple[int, str] | None:
    """The exit status and the line for what went wrong; None for what no user is to blame for, nor a machine."""
    who = f"rank {team.rank}: " if team.size > 1 else ""
    if isinstance(error, Diverged | RankError):
        return 1, str(error)
    if is_out_of_memory(error):
        return 1, f"{who}out of memory: {first_line(error)}"
    if isinstance(error, CheckpointError) or preparing and isinstance(error, ValueError):
        return 2, str(error)
    return (2, f"{who}{error}") if isinstance(error, DamagedFile | OSError) else None


@contextlib.contextmanager
def shown_by_the_first(team: Team) -> Iterator[None]:
    """What is printed inside is printed once: other ranks are quiet."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if team.is_first else nowhere):
        yield


def resume_command(p: argparse.ArgumentParser, argv: Sequence[str] | None, team: Team = ALONE) -> str:
    """The command that goes on with this run of a program; over ranks, on one machine."""
    if REGISTERED:  # which no command has
        return "your own script, with --resume among the arguments: the tasks that it registers are there alone"
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    program = p.prog.split()
    if team.size > 1:
        program[0] = f"torchrun --standalone --nproc-per-node {team.size}"
    return f"{' '.join(program)} {shlex.join([*arguments, '--resume'])}"
