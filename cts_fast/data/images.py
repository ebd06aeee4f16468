"""Images that are too many for memory: in a mapped file, or decoded when they are asked for.

Both stand where a tensor [N, C, H, W] would: `shape`, `len()`, and ``images[i]``, ``images[a:b]`` or
``images[numbers]``, which make a new uint8 tensor of these images alone.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.data.decode import REMEDY, decode
from cts_fast.data.errors import DamagedFile

WORKERS = os.cpu_count() or 1
Index = int | slice | Tensor


@dataclass(frozen=True)
class Samples:
    """Images of a split before they are decoded.

    items: a sequence of paths, or of pixels as `decode` takes them; labels: int64 [N]; key: says the version of pixels,
    for those that were read from files their `fingerprint` before that; remedy: what a message about a damaged image
    tells to do.
    """

    items: Any
    labels: Tensor
    key: str = ""
    remedy: str = REMEDY

    def __len__(self) -> int:
        return len(self.labels)

    def version(self) -> str:
        """Changes with the `fingerprint` of the files, with their order and with the labels; or with `key`.

        Raises DamagedFile that names a file which is gone.
        """
        if self.key:
            return hashlib.sha256(self.key.encode()).hexdigest()[:16]
        try:
            found = fingerprint(self.items)
        except FileNotFoundError as error:
            raise DamagedFile(f"the image {error.filename} is gone since it was found: {self.remedy}") from None
        return hashlib.sha256(self.labels.numpy().tobytes() + found.encode()).hexdigest()[:16]

    def select(self, numbers: Tensor) -> Samples:
        """Some of them, in this order."""
        items = [self.items[i] for i in numbers.tolist()]
        return replace(self, items=items, labels=self.labels[numbers])


def fingerprint(files: Sequence[str | os.PathLike]) -> str:
    """Changes with where files lie, and with the name, size or time of change of any of them."""
    paths = [os.fspath(file) for file in files]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    digest = hashlib.sha256(os.fsencode(os.path.realpath(base)))
    for path in paths:
        about = os.stat(path)
        digest.update(f"{os.path.relpath(path, base)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class LazyImages:
    """What both kinds have in common; `numbers` are those of the images that are seen, None for all."""

    def __init__(self, shape: tuple[int, int, int, int], numbers: Tensor | None) -> None:
        self.numbers = numbers
        self.shape = torch.Size((shape[0] if numbers is None else len(numbers), *shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Tensor:
        if isinstance(index, int):
            return self.read(self._chosen(slice(index, index + 1 or None)))[0]
        return self.read(self._chosen(index))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them together."""
        return self.shape.numel()

    def _chosen(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        if self.numbers is None:
            return index if isinstance(index, Tensor) else torch.arange(len(self))[index]
        return self.numbers[index]

    def read(self, numbers: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of these numbers."""
        raise NotImplementedError

    def select(self, numbers: Tensor) -> LazyImages:
        """Some of them, in this order; none is read."""
        raise NotImplementedError

    def prefetch(self, index: Tensor) -> None:
        """These will be asked for soon."""


class MappedImages(LazyImages):
    """uint8 [N, C, H, W] in a .npy file: the kernel reads what is touched and drops it when memory is short."""

    def __init__(self, path: Path, numbers: Tensor | None = None) -> None:
        import numpy as np

        self.path = path
        self.array = np.load(path, mmap_mode="r").view(np.ndarray)
        super().__init__(self.array.shape, numbers)

    def read(self, numbers: Tensor) -> Tensor:
        return torch.from_numpy(self.array.take(numbers.numpy(), axis=0))

    def select(self, numbers: Tensor) -> MappedImages:
        return MappedImages(self.path, self._chosen(numbers))


class DecodedImages(LazyImages):
    """Images of `samples` that workers decode when they are asked for, again each time.

    Raises DamagedFile, at that time, for a file that cannot be read.
    """

    _pool: ThreadPoolExecutor | None = None
    _lock = threading.Lock()

    def __init__(self, samples: Samples, size: int, channels: int, numbers: Tensor | None = None) -> None:
        self.samples, self.size, self.channels = samples, size, channels
        self.coming: dict[int, Future] = {}
        super().__init__((len(samples), channels, size, size), numbers)

    @classmethod
    def pool(cls) -> ThreadPoolExecutor:
        """The workers of all tasks: threads, for Pillow decodes and resizes without Python's lock."""
        with cls._lock:
            if cls._pool is None:
                cls._pool = ThreadPoolExecutor(WORKERS, "decode")
            return cls._pool

    def prefetch(self, index: Tensor) -> None:
        for number in self._chosen(index).tolist():
            if number not in self.coming:
                self.coming[number] = self._submit(number)

    def read(self, numbers: Tensor) -> Tensor:
        futures = [self.coming.pop(number, None) or self._submit(number) for number in numbers.tolist()]
        return torch.stack([torch.from_numpy(future.result()) for future in futures])

    def select(self, numbers: Tensor) -> DecodedImages:
        return DecodedImages(self.samples, self.size, self.channels, self._chosen(numbers))

    def _submit(self, number: int) -> Future:
        item, remedy = self.samples.items[number], self.samples.remedy
        return self.pool().submit(decode, item, self.size, self.channels, remedy)
