"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails inside because something cannot be written raises OSError that names `path`: no space, no permission,
    a folder that is gone.
    """
    try:
        yield
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, f"cannot write: {cause.strerror or cause}", str(path)) from error


@contextmanager
def temporary(path: Path, remove: Callable[[Path], None]) -> Iterator[Path]:
    """A name beside `path`, of this process alone; what stands there at the end takes the place of `path`.

    remove: takes away what is left of it after a failure. Raises OSError as `naming` does.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            yield beside
            os.replace(beside, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(beside)
            raise


@contextmanager
def written(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that takes the place of `path` when it is whole and on the disk; nothing is left of one that is not.

    Raises as `temporary` does.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    with temporary(path, lambda left: left.unlink(missing_ok=True)) as beside:
        with open(beside, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: a library that writes may have wrapped it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def sync_folder(path: Path) -> None:
    """Put a folder's list of files on the disk."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems refuse it; the file itself is whole
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Hashing:
    """A file to write to that keeps the SHA-256 of what it was given, and the failure that a library may hide."""

    def __init__(self, file: IO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_part(path: Path, value: Any) -> str:
    """Writes a new file through to the disk, as its name ends: .pt, .safetensors or .json; returns its SHA-256.

    Raises OSError where that fails. To be called where half a file does no harm.
    """
    with open(path, "xb") as file:
        hashing = Hashing(file)
        if path.suffix == ".pt":
            try:
                torch.save(value, cast("IO[bytes]", hashing))  # which writes and flushes, and nothing else
            except RuntimeError:
                if hashing.error is not None:
                    raise hashing.error from None
                raise
        elif path.suffix == ".safetensors":
            hashing.write(_safetensors(value))
        else:
            hashing.write(json.dumps(value, allow_nan=False).encode())
        file.flush()
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


def read_part(path: Path) -> Any:
    """What `write_part` wrote, on the CPU: tensors and plain values, nothing else; .safetensors are not read."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True, map_location="cpu")
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _safetensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    data = _safetensors(tensors, metadata)
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
