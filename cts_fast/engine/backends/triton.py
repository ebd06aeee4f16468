"""The step on GPUs in Triton: one launch of kernels/shifting_step.py, gradients' addresses in a table on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cts_fast.engine.backends.base import Backend
from cts_fast.engine.backends.device_table import DeviceTable, device_rate, host_addresses
from cts_fast.engine.backends.gpu import make_tiles, too_old
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat, Segment
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.kernels import shifting_step as kernel

NONE = (None,) * 5


def tile_shape(tasks: int, work_dtype: torch.dtype) -> dict[str, int]:
    """Rows held in registers at once and columns of a program: 16 bytes of each row for each of 128 threads."""
    return {"ROWS": min(triton.next_power_of_2(tasks), 8), "BLOCK": 128 * 16 // work_dtype.itemsize}


def _entries(flat: Flat, segment: Segment, at: Tensor, first: int) -> tuple[Tensor, ...]:
    """Those of a tile (`kernel.TILE` of them)."""
    group, gradient = torch.full_like(at, segment.group), torch.full_like(at, first)
    return segment.offset + at, segment.numel - at, at, group, gradient


def _plain(tasks: int, rows: int, hyper: Sequence[Hyper], control: Control) -> bool:
    """Whether the usual rule is all that this step needs, with its tasks in registers: in the loop over more of them it
    would spill.
    """
    scaled = control.inverse_scale != 1 or (control.counting is not None and control.counting.grad_scale is not None)
    rule = all(h.momentum != 0 and not (h.nesterov or h.maximize or h.dampening) for h in hyper)
    return tasks <= rows and rule and not scaled and control.nonfinite is None


def _mode(control: Control) -> int:
    """The kernel's bits of what this step does."""
    meta_update, reset = control.meta_update * kernel.META_UPDATE.value, control.reset * kernel.RESET.value
    return meta_update | reset | control.reset_momentum * kernel.RESET_MOMENTUM.value


class Triton(Backend):
    """Launches the kernel for all buffers of one device and dtype."""

    counts_on_device = True

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
        """Why it cannot run there; None if it can: CPU tensors under TRITON_INTERPRET=1, else CUDA ones."""
        if kernel.INTERPRETED.value:
            return None if device.type == "cpu" else "TRITON_INTERPRET is set, which runs Triton on CPU tensors only"
        if device.type != "cuda":
            return (
                "Triton runs on NVIDIA GPUs, or on CPU tensors under TRITON_INTERPRET=1; "
                f"the parameters are on {device}"
            )
        return too_old(device) if torch.version.hip is None else None

    def __init__(self, flats: Sequence[Flat]) -> None:
        super().__init__(flats)
        self.shared = flats[0] if flats[0].shared else None
        self.head = None if flats[-1].shared else flats[-1]
        self.device, self.work_dtype = flats[0].device, flats[0].work_dtype
        self.count = sum(len(flat.params) for flat in flats)
        self.shared_count = len(self.shared.params) if self.shared else 0
        self.tasks = self.shared.rows if self.shared else 1
        self.shape = tile_shape(self.tasks, self.work_dtype)
        tiles = make_tiles(flats, lambda flat: self.shape["BLOCK"], _entries)
        segments = self.shared.segments if self.shared else []
        self.shared_tiles = sum(-(-segment.numel // self.shape["BLOCK"]) for segment in segments)
        self.num_tiles = len(tiles)
        if not len(tiles):
            tiles = torch.zeros(1, kernel.TILE.value, dtype=torch.int64, device="cpu")
        self.tiles = tiles.to(self.device)
        groups = [segment.group for flat in flats for segment in flat.segments for _ in range(flat.rows)]
        self.groups = torch.tensor(groups, dtype=torch.int32, device=self.device)
        self.num_groups = max(groups) + 1
        self.ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.table, self.flags = DeviceTable(self.device), DeviceTable(self.device)
        self.rates = DeviceTable(self.device)  # what of the table the second half of a step reads

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        counting = control.counting
        if not self.num_tiles and counting is None:
            return
        hyper = hyper[: self.num_groups]
        addresses = host_addresses(gradients)
        dampened = any(h.dampened for h in hyper)
        shared, head = self.shared, self.head
        buffers = (shared.theta, shared.momentum, shared.master, shared.phi, shared.theta.stride(0)) if shared else NONE
        heads = (head.theta, head.momentum, head.master) if head else NONE[:3]
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            started = self._started(dampened, control)
            table = self._table(addresses, hyper, control)
            launch: Any = kernel.shifting_step_kernel[(max(self.num_tiles, 1),)]  # Triton gives it further arguments
            launch(
                self.tiles,
                table[: self.count],
                self.groups,
                table[self.count :].view(torch.float64),
                started,
                control.nonfinite,
                *buffers,
                *heads,
                self.shared_tiles,
                self.shared_count,
                self.count,
                _mode(control),
                *self._counts(control),
                **self._constants(addresses, hyper, control, dampened and started is not None),
            )

    def _constants(self, addresses: Tensor, hyper: Sequence[Hyper], control: Control, dampened: bool) -> dict[str, Any]:
        """What a kernel with an inner step is compiled for."""
        return {
            "T": self.tasks,
            **self.shape,
            "ALIGNED": not (addresses & 15).any(),
            "WORK": tl.float64 if self.work_dtype == torch.float64 else tl.float32,
            "DAMPENED": dampened,
            "PLAIN": _plain(self.tasks, self.shape["ROWS"], hyper, control),
            "num_warps": 4,
            "enable_fp_fusion": False,
        }

    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        if not self.num_tiles:
            return
        hyper = hyper[: self.num_groups]
        addresses = host_addresses(gradients)
        dampened = any(h.dampened for h in hyper)
        shared, head = self.flats[0], self.head
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            started = self._started(dampened, control)
            table = self._table(addresses, hyper, control)
            launch: Any = kernel.partial_step_kernel[(self.num_tiles,)]
            launch(
                self.tiles,
                table[: self.count],
                table[self.count :].view(torch.float64),
                started,
                control.nonfinite,
                *(shared.theta, shared.momentum, shared.master, shared.phi, shared.theta.stride(0)),
                *((head.theta, head.momentum, head.master) if head else NONE[:3]),
                total,
                self.shared_tiles,
                _mode(control),
                **self._constants(addresses, hyper, control, dampened and started is not None),
            )

    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        if not self.shared_tiles:
            return
        flat = self.flats[0]
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            numbers = self.rates(_numbers(hyper[: self.num_groups], control).flatten()).view(torch.float64)
            launch: Any = kernel.finish_step_kernel[(self.shared_tiles,)]
            launch(
                self.tiles,
                numbers,
                *(flat.theta, flat.master, flat.phi, flat.theta.stride(0)),
                total,
                _mode(control),
                T=self.tasks,
                **self.shape,
                WORK=tl.float64 if self.work_dtype == torch.float64 else tl.float32,
                num_warps=4,
                enable_fp_fusion=False,
            )

    def _started(self, dampened: bool, control: Control) -> Tensor | None:
        """The first-gradient flags on the device; None where it need not read them."""
        if control.counting is not None:
            return self.flats[0].started
        if dampened and not all(flat.all_started for flat in self.flats):
            return self.flags(torch.cat([flat.started.flatten() for flat in self.flats]))
        return None

    def _counts(self, control: Control) -> tuple:
        """Where the device counts: counters, ticket, horizon, meta_interval, found_inf, grad_scale, whether it advances
        them.
        """
        on = control.counting
        if on is None:
            return (None,) * 7
        optional = (on.found_inf, on.grad_scale)
        return (on.counters, self.ticket, on.horizon, on.meta_interval, *optional, int(on.advances))

    def _table(self, addresses: Tensor, hyper: Sequence[Hyper], control: Control) -> Tensor:
        """The device's table: int64 [count + groups · HYPER], gradients, then the hyper-parameters' bits."""
        rows = torch.cat([addresses, _numbers(hyper, control).flatten()])
        return self.table(rows, control.counting is not None)


def _numbers(hyper: Sequence[Hyper], control: Control) -> Tensor:
    """The hyper-parameters' bits as the kernels read them, int64 [groups, HYPER]."""
    rates = [(*device_rate(h.lr), *device_rate(h.meta_lr)) for h in hyper]
    numbers = [[0.0 if isinstance(value, Tensor) else float(value) for value in h] for h in hyper]
    last = torch.full((len(hyper), 1), float(control.num_tasks), dtype=torch.float64, device="cpu")
    scaled = [[*values, control.inverse_scale] for values in numbers]
    bits = torch.tensor(scaled, dtype=torch.float64, device="cpu").view(torch.int64)
    parts = (bits, torch.tensor(rates, dtype=torch.int64, device="cpu"), last.view(torch.int64))
    return torch.cat(parts, dim=1)
