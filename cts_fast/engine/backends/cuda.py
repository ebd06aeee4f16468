"""The step on NVIDIA GPUs in CUDA C++: one launch, gradients' addresses by value (csrc/cuda/shifting_step.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import CONTROL_FIELDS, DTYPES, Backend, packed_flat
from cts_fast.engine.backends.device_table import DeviceTable, device_rate, host_addresses
from cts_fast.engine.backends.gpu import make_tiles, too_old
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat, Segment
from cts_fast.engine.native import load
from cts_fast.engine.plan import Control, Counting
from cts_fast.engine.rules.sgd import Hyper

_cuda = load("_cuda")

NO_BUFFERS = (0, 0, 0, 0, 0, 1)


def largest_first(flats: Sequence[Flat]) -> Tensor:
    """The tiles of all segments as csrc/cuda/launch.h lays them out, int64 [tiles, 4]; small ones fill the gaps at the
    end.
    """
    tasks = flats[0].rows if flats[0].shared else 1
    columns, head_columns = _cuda.tile_columns(tasks, flats[0].work_dtype.itemsize)

    def most(flat: Flat) -> int:
        return columns if flat.shared else head_columns

    def entries(flat: Flat, segment: Segment, at: Tensor, first: int) -> tuple[Tensor, ...]:
        count = (segment.numel - at).clamp(max=most(flat))
        place = torch.full_like(at, first | (not flat.shared) << 32)
        return segment.offset + at, at, count | segment.group << 32, place

    tiles = make_tiles(flats, most, entries)
    return tiles[(tiles[:, 2] & 0xFFFFFFFF).argsort(descending=True, stable=True)]


class Cuda(Backend):
    """Launches the kernel for all buffers of one device and dtype; a step is one native call."""

    counts_on_device = True

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
        """Why it cannot run there; None if it can."""
        if device.type != _cuda.device_type:
            return f"it runs on {_cuda.device_type} devices, not on {device}"
        if dtype not in DTYPES:
            return f"it has no kernel for {dtype}"
        if groups > _cuda.max_groups:
            return f"it takes up to {_cuda.max_groups} param groups, not {groups}"
        driver = _cuda.driver_version()
        if driver < _cuda.needs_driver:
            return f"the driver is for CUDA {_version(driver)}; this build needs {_version(_cuda.needs_driver)}"
        return too_old(device) if device.type == "cuda" else None

    def __init__(self, flats: Sequence[Flat]) -> None:
        super().__init__(flats)
        device, on_gpu = flats[0].device, flats[0].device.type == "cuda"
        tiles = largest_first(flats)
        self.num_tiles = len(tiles)
        self.tiles = (tiles if len(tiles) else torch.zeros(1, 4, dtype=torch.int64, device="cpu")).to(device)
        groups = [segment.group for flat in flats for segment in flat.segments for _ in range(flat.rows)]
        self.groups, self.num_groups = torch.tensor(groups, dtype=torch.int32, device=device), max(groups) + 1
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.table = DeviceTable(device) if len(groups) > _cuda.max_pointers else None
        self.flags = DeviceTable(device)
        self.index = (device.index or 0) if on_gpu else 0
        cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
        streams = sum(flat.theta.nbytes + flat.momentum.nbytes for flat in flats) > cache
        shared = packed_flat(flats[0]) if flats[0].shared else NO_BUFFERS
        heads = NO_BUFFERS if flats[-1].shared else packed_flat(flats[-1])
        shared_count = len(flats[0].params) if flats[0].shared else 0
        places = (self.tiles.data_ptr(), max(self.num_tiles, 1), groups, shared_count)
        self.stepper = _cuda.Stepper(DTYPES[flats[0].dtype], self.index, shared, heads, *places, streams)

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        counting = control.counting
        if not self.num_tiles and counting is None:
            return
        hyper = hyper[: self.num_groups]
        rates = [(device_rate(h.lr), device_rate(h.meta_lr)) for h in hyper]
        numbers = [
            h._replace(lr=0.0 if lr else h.lr, meta_lr=1.0 if meta_lr else h.meta_lr)
            for h, ((lr, _), (meta_lr, _)) in zip(hyper, rates, strict=True)
        ]
        with self._on_device():
            table = 0 if self.table is None else self.table(host_addresses(gradients), counting is not None).data_ptr()
            self.stepper.step(
                gradients.address,
                table,
                self._started(hyper, counting),
                0 if counting is not None else self.flats[0].started.data_ptr(),
                0 if control.nonfinite is None else control.nonfinite.data_ptr(),
                numbers,
                rates,
                control[:CONTROL_FIELDS],
                control.after,
                (0,) * 8 if counting is None else self._counts(counting),
                self._stream(),
            )

    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        if not self.num_tiles:
            return
        with self._on_device():
            table = 0 if self.table is None else self.table(host_addresses(gradients)).data_ptr()
            self.stepper.partial(
                gradients.address,
                table,
                self._started(hyper, None),
                self.flats[0].started.data_ptr(),
                0 if control.nonfinite is None else control.nonfinite.data_ptr(),
                hyper[: self.num_groups],
                control[:CONTROL_FIELDS],
                total.data_ptr(),
                self._stream(),
            )

    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        if not self.num_tiles:
            return
        with self._on_device():
            settled = (hyper[: self.num_groups], control[:CONTROL_FIELDS], control.after)
            self.stepper.finish(*settled, total.data_ptr(), self._stream())

    def _on_device(self):
        return torch.cuda.device(self.index if self.flats[0].device.type == "cuda" else -1)

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.flats[0].device.type == "cuda" else 0

    def _started(self, hyper: Sequence[Hyper], counting: Counting | None) -> int:
        """Where the device reads the first-gradient flags; 0 where it need not."""
        if counting is not None:
            return self.flats[0].started.data_ptr()
        if any(h.dampened for h in hyper) and not all(flat.all_started for flat in self.flats):
            return self.flags(torch.cat([flat.started.flatten() for flat in self.flats])).data_ptr()
        return 0

    def _counts(self, counting: Counting) -> tuple:
        optional = (counting.found_inf, counting.grad_scale)
        found_inf, grad_scale = (0 if tensor is None else tensor.data_ptr() for tensor in optional)
        addresses = (
            counting.counters.data_ptr(),
            self.ticket.data_ptr(),
            found_inf,
            grad_scale,
            self.groups.data_ptr(),
        )
        return (*addresses, counting.horizon, counting.meta_interval, counting.advances)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
