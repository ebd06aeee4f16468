"""The step on the CPU in native code: one parallel region and one pass over memory (csrc/cpu/shifting_step.cpp).

The environment variable CTS_FAST_ISA takes another instruction set than the widest ("avx512", "avx2" or "plain").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.engine.backends.base import LeapPoint, Passes
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.step import Control, Hyper

try:
    from cts_fast import _cpu
except ImportError as error:
    raise ImportError(
        f"the native module is not there ({error}); reinstall with CTS_FAST_BUILD=cpu and a C++ compiler to see why"
    ) from error

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_shares_openmp = _cpu.share_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
TEAM = "torch's own OpenMP threads" if _shares_openmp else "threads of its own for every step"


def instruction_set() -> str:
    """The instruction set that runs: the environment's CTS_FAST_ISA, else the widest that this machine has."""
    return os.environ.get("CTS_FAST_ISA") or _cpu.instruction_sets()[0]


def unavailable(device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
    """Why this backend cannot run there; None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if instruction_set() not in _cpu.instruction_sets():
        return f"CTS_FAST_ISA={instruction_set()!r}; this machine has {', '.join(_cpu.instruction_sets())}"
    return None if dtype in DTYPES else f"it has no kernel for {dtype}"


class Launcher(Passes):
    """All buffers of one dtype, cut into tiles once; a call is one native call, and so is each pass."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats = flats
        self.started = flats[0].started  # the flags of all flats lie behind it
        buffers, segments, first = [], [], 0
        for flat in flats:
            pointers = [
                0 if tensor is None else tensor.data_ptr()
                for tensor in (flat.phi, flat.theta, flat.momentum, flat.master)
            ]
            buffers.append((*pointers, flat.theta.stride(0), flat.rows))
            segments.append([(s.offset, s.numel, s.group, first + n * flat.rows) for n, s in enumerate(flat.segments)])
            first += len(flat.params)
        self.plan = _cpu.Plan(DTYPES[flats[0].dtype], buffers, segments, instruction_set())

    def __call__(
        self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, leap: tuple | None = None, measures: bool = False
    ) -> float:  # fmt: skip
        started = 0 if all(flat.all_started for flat in self.flats) else self.started.data_ptr()
        nonfinite = 0 if control.nonfinite is None else control.nonfinite.data_ptr()
        return self.plan.step(
            gradients.address, started, nonfinite, hyper, control.meta_update, control.reset, control.reset_momentum,
            control.inverse_scale, leap, measures, torch.get_num_threads(),
        )  # fmt: skip

    def measured_step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> float:
        return self(gradients, hyper, control, measures=True)

    def leap_step_(self, point: LeapPoint, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        kept = (point.total.data_ptr(), point.theta.data_ptr(), point.gradient.data_ptr(), point.theta.stride(0))
        self(gradients, hyper, control, (*kept, point.weights, point.changes, point.scale, point.keeps))

    def add_gradients_(self, target: Tensor, gradients: Gradients, weight: float) -> None:
        self.plan.add_gradients(gradients.address, target.data_ptr(), weight, torch.get_num_threads())

    def end_round_(self, total, gradients, weight: float, rates: Sequence[float], clear_momentum: bool) -> None:
        given = (0 if gradients is None else gradients.address, 0 if total is None else total.data_ptr())
        self.plan.end_round(*given, weight, rates, clear_momentum, torch.get_num_threads())
        if clear_momentum:
            self.flats[0].forget_started_()

    def reset_(self, clear_momentum: bool) -> None:
        self.end_round_(None, None, 0.0, (), clear_momentum)

    def squared_distances(self, rows: Tensor) -> list[float]:
        return self.plan.squared_distances(rows.data_ptr(), rows.stride(0), torch.get_num_threads())

    def add_signs_(self, key: int, first: int, scale: float) -> None:
        self.plan.add_signs(key, first, scale, torch.get_num_threads())
