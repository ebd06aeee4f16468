"""Images decoded once into files that are mapped into memory: one folder for each split, size and version."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.data.decode import decode
from cts_fast.data.errors import DamagedFile
from cts_fast.data.images import DecodedImages, LazyImages, MappedImages, Samples

FORMAT = 1  # another one makes every cached file anew
FOLDER = ".cts-fast-cache"  # in the data root, unless another place is given
LIMIT = 20e9
TITLE_BYTES = 120  # of a folder's name, which may have 255
CHUNK = 512  # images between two writes


@dataclass(frozen=True)
class Storage:
    """How images that lie in files are held.

    size: side length, None for each task's own; cache: folder of the decoded images, None for `FOLDER` in the data
    root; limit: bytes of a task above which nothing is cached and workers decode each batch; partial: accept data
    sets of which images are missing; download: fetch what is missing.
    """

    size: int | None = None
    cache: Path | None = None
    limit: float = LIMIT
    partial: bool = False
    download: bool = False


def hold(
    name: str, splits: Sequence[Samples], size: int, channels: int, cache: Path, limit: float = LIMIT
) -> list[tuple[LazyImages, Tensor]]:
    """Images and labels of a task's splits: mapped, or decoded by workers where all exceed `limit` bytes together.

    Raises DamagedFile that names an image which cannot be decoded, OSError where the cache cannot be written.
    """
    if sum(map(len, splits)) * channels * size * size > limit:
        return [(DecodedImages(samples, size, channels), samples.labels) for samples in splits]
    titles = (f"{name}-train", f"{name}-test")
    return [mapped(title, samples, size, channels, cache) for title, samples in zip(titles, splits, strict=True)]


def mapped(title: str, samples: Samples, size: int, channels: int, cache: Path) -> tuple[MappedImages, Tensor]:
    """Images and labels from the cache; decoded into it before, if they are not there in this version."""
    entry = cache / f"{_short(title)}-{channels}x{size}x{size}-v{FORMAT}-{samples.version()}"
    if not entry.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(entry.with_name(entry.name + ".lock"), f"{title} is being decoded by another process"):
                if not entry.is_dir():  # the other process may have made it
                    _build(entry, title, samples, size, channels)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                error.errno,
                f"the decoded images cannot be kept ({reason}): give another place (--cache-dir)",
                str(entry),
            ) from error
    return open_mapped(entry, (len(samples), channels, size, size))


def _short(title: str) -> str:
    """A title that leaves room in a folder's name for what tells entries apart; a long one keeps its beginning."""
    data = os.fsencode(title)
    if len(data) <= TITLE_BYTES:
        return title
    return f"{data[:TITLE_BYTES].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def open_mapped(entry: Path, shape: tuple[int, ...]) -> tuple[MappedImages, Tensor]:
    """Images and labels of a finished entry; raises DamagedFile if the files hold something else."""
    import numpy as np

    try:
        images, labels = MappedImages(entry / "images.npy"), torch.from_numpy(np.load(entry / "labels.npy"))
        if tuple(images.shape) != shape or images.array.dtype != "uint8" or len(labels) != len(images):
            raise ValueError(f"they are {images.array.dtype} {tuple(images.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise DamagedFile(f"the decoded images in {entry} are damaged ({error}): delete this folder") from None
    return images, labels


def _build(entry: Path, title: str, samples: Samples, size: int, channels: int) -> None:
    """Decode into a folder that takes its name when it is whole; called by the holder of the entry's lock."""
    import numpy as np
    from tqdm import tqdm

    part = entry.with_name(entry.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed: nobody else may be writing there
    shape = (len(samples), channels, size, size)
    try:
        part.mkdir()
        if not sys.stderr.isatty():
            print(f"decoding {title}: {len(samples):,} images", file=sys.stderr, flush=True)
        with (
            open(part / "images.npy", "wb") as file,
            tqdm(total=len(samples), desc=title, unit="image", disable=None) as bar,
        ):
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for numbers in torch.arange(len(samples)).split(CHUNK):
                items = [samples.items[i] for i in numbers.tolist()]
                work = DecodedImages.pool().map(lambda item: decode(item, size, channels, samples.remedy), items)
                for pixels in work:
                    file.write(pixels.data)
                bar.update(len(numbers))
            file.flush()
            os.fsync(file.fileno())
        np.save(part / "labels.npy", samples.labels.numpy())  # after the images: a data set tells them together
        os.replace(part, entry)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends; says what it waits for."""
    from filelock import FileLock, Timeout  # torch needs it too

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: {waiting_for} ({path})", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
