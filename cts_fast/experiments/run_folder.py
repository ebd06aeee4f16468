"""A program's folder: files that are whole or not there, and a mark on what is finished."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

CONFIG, RESULTS, FINISHED = "config.json", "results.json", "finished.json"
REPORTED = ("metrics.csv", "*.png", "*.safetensors")  # what a run leaves beside its parts and results
# what torch.load and the use of what it returns raise for a file that is cut, damaged or of something else
DAMAGE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)
NOT_NOW = (OSError, torch.OutOfMemoryError)  # what they raise for a file that may be whole


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message names the file and says what to do."""


class Interrupted(Exception):
    """The user or the system asked to stop; everything is saved. status: the exit status, which names the signal."""

    def __init__(self, status: int = 130) -> None:
        super().__init__(f"stopped by signal {status - 128}")
        self.status = status


class RunFolder:
    """The folder `path` of one run.

    Args:
        config: what defines the run, ready for JSON; a resumed run must have the same.
        parts: patterns of the files that a resumed run reads.
        resume: go on from the parts; overwrite: replace what is there.

    Raises:
        CheckpointError: the folder holds an interrupted or a finished run and neither is given, or another run and
            `resume` is.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], parts: Sequence[str], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path, self.config = path, config
        if resume:
            check_same_config(path / CONFIG, config)
            return
        stale = [file for pattern in (*parts, RESULTS, FINISHED) for file in path.glob(pattern)]
        if stale and not overwrite:
            if self.finished:
                raise CheckpointError(
                    f"{path} holds a finished run: choose another --out, or add --resume to see its results again, "
                    "or --overwrite to replace it"
                )
            raise CheckpointError(
                f"{path} holds a run that was interrupted: add --resume to go on with it, or choose another --out, "
                "or add --overwrite to replace it"
            )
        path.mkdir(parents=True, exist_ok=True)
        old = [file for pattern in (*REPORTED, ".*.tmp") for file in path.glob(pattern)] if overwrite else []
        # the mark first: what is half gone is not finished
        for file in sorted((*stale, *old), key=lambda file: file.name != FINISHED):
            file.unlink(missing_ok=True)
        write_json(path / CONFIG, config, indent=1)

    @property
    def finished(self) -> bool:
        """Whether all of the run is done, its results included."""
        return (self.path / FINISHED).exists()

    def finish(self) -> None:
        """Mark the run as finished: the last thing that a program writes."""
        mark_finished(self.path)


def mark_finished(path: Path) -> None:
    """Say in the folder that its run is finished."""
    write_json(path / FINISHED, {"finished": True})


@contextmanager
def written(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that takes the place of `path` when it is whole and on the disk; nothing is left of one that is not.

    Raises OSError that names `path`: no space, no permission, a folder that is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error) if isinstance(error, Exception) else None
        if cause is None:
            raise
        raise OSError(cause.errno, f"cannot write: {cause.strerror or cause}", str(path)) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: a library that writes may have wrapped it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems refuse it; the file itself is whole
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Checked:
    """A file whose failures torch cannot hide: it keeps the first one."""

    def __init__(self, file: IO) -> None:
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_state(path: Path, state: Any) -> None:
    """torch.save, whole or not at all; raises OSError that names the path."""
    with written(path) as file:
        checked = _Checked(file)
        try:
            torch.save(state, cast("IO[bytes]", checked))  # which writes and flushes, and nothing else
        except RuntimeError:
            if checked.error is not None:
                raise checked.error from None
            raise


def load_state(path: Path, device: str | torch.device = "cpu") -> Any:
    """What `save_state` wrote: tensors and plain values, nothing else. To be called inside `reading`."""
    return torch.load(path, weights_only=True, map_location=device)


@contextmanager
def reading(path: Path, again: str = "") -> Iterator[None]:
    """Around the loading of a part and the first use of it: what fails raises CheckpointError that says what to do.

    again: for what the part may be deleted, as " to meta-train anew".
    """
    try:
        yield
    except CheckpointError:
        raise
    except NOT_NOW as error:
        raise CheckpointError(
            f"{path} cannot be read now ({first_line(error)}); nothing is lost: resume when that is repaired"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}): delete it{again}, then resume") from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with written(path) as file:
        file.write(data)


def save_figure(path: Path, figure: Any) -> None:
    """A matplotlib figure as a picture, whole or not at all."""
    with written(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A table with a line of headings, whole or not at all."""
    with written(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """JSON, whole or not at all; numbers that JSON has not raise ValueError."""
    text = json.dumps(value, allow_nan=False, **options)
    with written(path, "w") as file:
        file.write(text)


def read_json(path: Path) -> Any:
    """What a run left in a file; raises CheckpointError that says what to do where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no run to resume: {path} is missing; start it without --resume") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read now ({first_line(error)}); nothing is lost") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}): start anew in another --out") from error


def check_same_config(path: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError if the run whose config is in the file is not there or is another one."""
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is damaged: start anew in another --out")
    changed = [key for key in sorted({*saved, *config}) if saved.get(key) != config.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {saved.get(key)!r}, now {config.get(key)!r}" for key in changed)
        raise CheckpointError(
            f"{path.parent} holds another run ({differences}): "
            "give the same arguments, or another --out without --resume"
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class Stop:
    """Whether a signal asked to stop: ``stop()``; `status` says which, as an exit status."""

    def __init__(self) -> None:
        self.requested, self.status = threading.Event(), 130

    def __call__(self) -> bool:
        return self.requested.is_set()

    def check(self) -> None:
        """Raises `Interrupted` if one did."""
        if self():
            raise Interrupted(self.status)


@contextmanager
def on_signals(names: Sequence[str], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` for these signals; those that are ignored stay so (nohup). Threads but the main one change nothing."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM and SIGHUP ask to stop; a second one, after a second, stops at once."""
    stop, first = Stop(), 0.0

    def handler(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if not stop():
            first, stop.status = now, 128 + number
            stop.requested.set()
        elif now - first > 1:  # a wrapper may pass one Ctrl-C on twice
            raise Interrupted(128 + number)

    with on_signals(("SIGINT", "SIGTERM", "SIGHUP"), handler):
        yield stop
