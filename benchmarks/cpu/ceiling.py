"""The machine's ceiling for the step, measured: `ceiling.c`, compiled for this processor, and buffers to run it on."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

SOURCE = Path(__file__).with_name("ceiling.c")
PAGE, STAGGER = 1024, 160  # floats; streams or rows whole pages apart would share cache sets and memory banks
LARGE = 22_500_000  # numbers a stream: three streams of 90 MB
# (rows, columns in a tile, prefetch distance): one row is plain 3-read-2-write, more rows interleave their streams
SHAPES = (
    (1, 1024, 0),
    (1, 1024, 512),
    (1, 256, 128),
    (4, 4096, 512),
    (4, 1024, 512),
    (4, 256, 128),
    (8, 1024, 512),
    (16, 1024, 128),
)


def unavailable() -> str | None:
    """Why the ceiling cannot be measured here; None if it can."""
    return None if compiler() else "no C compiler (cc, gcc or clang) on the PATH"


def compiler() -> str | None:
    """The C compiler's path; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


@cache
def library() -> ctypes.CDLL:
    """`ceiling.c` as a library, which takes its threads from the OpenMP runtime that torch loaded.

    Raises RuntimeError without a compiler.
    """
    if unavailable():
        raise RuntimeError(f"the ceiling cannot be measured: {unavailable()}")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "ceiling.so"
        flags = ["-O3", "-march=native", "-fPIC", "-shared", "-fopenmp"]
        subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(built)], check=True, capture_output=True)
        loaded = ctypes.CDLL(str(built))
    pointer, number = ctypes.c_void_p, ctypes.c_ssize_t
    loaded.read3_write2.argtypes = [pointer] * 3 + [number] * 5 + [ctypes.c_int]
    loaded.walk.argtypes, loaded.walk.restype = [pointer, number, ctypes.c_int], ctypes.c_float
    loaded.fill.argtypes = [pointer, number, ctypes.c_int]
    loaded.arithmetic.argtypes, loaded.arithmetic.restype = [number], ctypes.c_float
    return loaded


class Read3Write2:
    """In-place 3-read-2-write over `rows` × `columns` numbers a stream: `step()` moves `bytes`."""

    def __init__(self, rows: int, columns: int, tile: int, ahead: int) -> None:
        columns = max(16, columns // 16 * 16)
        stride = columns if rows == 1 else -(-columns // PAGE) * PAGE + STAGGER
        length = rows * stride + ahead
        stream = -(-length // PAGE) * PAGE + STAGGER
        self.buffer = torch.full((3 * stream,), 1e-3)  # written: untouched pages cost nothing
        starts = self.buffer.view(3, -1)
        self.arguments = [*(x.data_ptr() for x in starts), rows, columns, stride, tile, ahead]
        self.bytes = 5 * rows * columns * 4
        self.call = library().read3_write2

    def step(self) -> None:
        self.call(*self.arguments, torch.get_num_threads())


def best_shape(repeats: int) -> tuple[tuple[int, int, int], dict[str, float]]:
    """The fastest of `SHAPES` on buffers far larger than any cache, and each one's median GB/s."""
    seconds: dict[tuple, list[float]] = {shape: [] for shape in SHAPES}
    moved = {}
    for _ in range(repeats):
        for rows, tile, ahead in SHAPES:
            kernel = Read3Write2(rows, LARGE // rows, tile, ahead)
            kernel.step()
            start = perf_counter()
            kernel.step()
            seconds[rows, tile, ahead].append(perf_counter() - start)
            moved[rows, tile, ahead] = kernel.bytes
    rates = {shape: moved[shape] / statistics.median(times) / 1e9 for shape, times in seconds.items()}
    best = max(rates, key=rates.get)
    names = {shape: "{} rows, tiles of {}, prefetch {}".format(*shape) for shape in SHAPES}
    return best, {names[shape]: rate for shape, rate in rates.items()}


def alone_gb_per_s(repeats: int) -> dict[str, float]:
    """What reads alone and writes alone get of a buffer far larger than any cache.

    Where reads and writes have lanes of their own, reads alone move less than 3-read-2-write.
    """
    walk = CacheFlush(5 * 4 * LARGE)
    rates = {}
    for name, run in (("reads", walk), ("writes", Fill(walk.buffer))):
        times = []
        for _ in range(repeats + 1):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        rates[name] = walk.buffer.nbytes / statistics.median(times[1:]) / 1e9
    return rates


def gflops_per_thread(repeats: int = 5, n: int = 2_000_000) -> float:
    """The most that one thread computes, in 10^9 multiplications and additions a second, all in registers."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        library().arithmetic(n)
        times.append(perf_counter() - start)
    return 2 * 96 * n / min(times) / 1e9


class CacheFlush:
    """Reads a buffer several times the last-level cache, so that the next run finds none of its data there."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.ones(nbytes // 256 * 64)  # written: untouched pages are all the same one

    def __reduce__(self) -> tuple:
        return CacheFlush, (self.buffer.nbytes,)  # another process makes its own

    def __call__(self) -> None:
        library().walk(self.buffer.data_ptr(), self.buffer.numel(), torch.get_num_threads())


class Fill:
    """Writes zeros over a buffer and reads nothing."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer

    def __call__(self) -> None:
        library().fill(self.buffer.data_ptr(), self.buffer.nbytes, torch.get_num_threads())
