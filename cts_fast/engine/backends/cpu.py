"""The step on the CPU in native code: one parallel region and one pass over memory (csrc/cpu/shifting_step.cpp).

The environment variable CTS_FAST_ISA takes another instruction set than the widest ("avx512", "avx2" or "plain").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.engine.backends.base import CONTROL_FIELDS, DTYPES, Backend, packed_flat
from cts_fast.engine.backends.method_ops import PathPoint
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.native import load
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper

_cpu = load("_cpu")

_shares_openmp = _cpu.share_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
TEAM = "torch's own OpenMP threads" if _shares_openmp else "threads of its own for every step"


def instruction_set() -> str:
    """The instruction set that runs: the environment's CTS_FAST_ISA, else the widest that this machine has."""
    return os.environ.get("CTS_FAST_ISA") or _cpu.instruction_sets()[0]


class Cpu(Backend):
    """All buffers of one dtype, cut into tiles once; a step is one native call, and so is each of a method's passes."""

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
        """Why it cannot run there; None if it can."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if instruction_set() not in _cpu.instruction_sets():
            return f"CTS_FAST_ISA={instruction_set()!r}; this machine has {', '.join(_cpu.instruction_sets())}"
        return None if dtype in DTYPES else f"it has no kernel for {dtype}"

    def __init__(self, flats: Sequence[Flat]) -> None:
        super().__init__(flats)
        self.started = flats[0].started  # the flags of all flats lie behind it
        segments, first = [], 0
        for flat in flats:
            segments.append([(s.offset, s.numel, s.group, first + n * flat.rows) for n, s in enumerate(flat.segments)])
            first += len(flat.params)
        self.stepper = _cpu.Stepper(DTYPES[flats[0].dtype], list(map(packed_flat, flats)), segments, instruction_set())

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        self._step_(gradients, hyper, control)

    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        self.stepper.partial(
            gradients.address,
            self.started.data_ptr(),
            all(flat.all_started for flat in self.flats),
            0 if control.nonfinite is None else control.nonfinite.data_ptr(),
            hyper,
            control[:CONTROL_FIELDS],
            total.data_ptr(),
            torch.get_num_threads(),
        )

    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        settled = (control[:CONTROL_FIELDS], control.after)
        self.stepper.finish(hyper, *settled, total.data_ptr(), torch.get_num_threads())

    def measured_step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> float:
        return self._step_(gradients, hyper, control, measure_phi=True)

    def path_step_(self, point: PathPoint, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        kept = (point.total.data_ptr(), point.theta.data_ptr(), point.gradient.data_ptr(), point.theta.stride(0))
        self._step_(gradients, hyper, control, (*kept, point.weights, point.changes, point.scale, point.keeps))

    def _step_(
        self,
        gradients: Gradients,
        hyper: Sequence[Hyper],
        control: Control,
        path: tuple | None = None,
        measure_phi: bool = False,
    ) -> float:
        all_started = all(flat.all_started for flat in self.flats)
        return self.stepper.step(
            gradients.address,
            self.started.data_ptr(),
            all_started,
            0 if control.nonfinite is None else control.nonfinite.data_ptr(),
            hyper,
            control[:CONTROL_FIELDS],
            control.after,
            path,
            measure_phi,
            torch.get_num_threads(),
        )

    def any_nonfinite(self, gradients: Gradients) -> Tensor:
        return torch.tensor(self.stepper.any_nonfinite(gradients.address, torch.get_num_threads()), device="cpu")

    def is_at_phi(self) -> bool:
        return self.stepper.is_at_phi(torch.get_num_threads())

    def add_gradients_(self, target: Tensor, gradients: Gradients, weight: float) -> None:
        self.stepper.add_gradients(gradients.address, target.data_ptr(), weight, torch.get_num_threads())

    def end_round_(self, total, gradients, weight: float, rates: Sequence[float], clear_momentum: bool) -> None:
        given = (0 if gradients is None else gradients.address, 0 if total is None else total.data_ptr())
        self.stepper.end_round(*given, weight, rates, clear_momentum, torch.get_num_threads())
        if clear_momentum:
            self.flats[0].forget_started_()

    def reset_(self, clear_momentum: bool) -> None:
        self.end_round_(None, None, 0.0, (), clear_momentum)

    def squared_distances(self, rows: Tensor) -> list[float]:
        return self.stepper.squared_distances(rows.data_ptr(), rows.stride(0), torch.get_num_threads())

    def add_signs_(self, key: int, first: int, scale: float) -> None:
        self.stepper.add_signs(key, first, scale, torch.get_num_threads())
