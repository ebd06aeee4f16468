"""The step on NVIDIA GPUs in CUDA C++: one launch, gradients' addresses by value (csrc/cuda/shifting_step.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Passes
from cts_fast.engine.backends.device_table import DeviceTable, host_addresses, rate_address
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.step import Control, Counting, Hyper

try:
    from cts_fast import _cuda
except ImportError as error:
    raise ImportError(
        f"the native module is not there ({error}); reinstall with CTS_FAST_BUILD=cuda and nvcc to see why"
    ) from error

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable(device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
    """Why this backend cannot run there; None if it can."""
    if device.type != _cuda.device_type:
        return f"it runs on {_cuda.device_type} devices, not on {device}"
    if dtype not in DTYPES:
        return f"it has no kernel for {dtype}"
    if groups > _cuda.max_groups:
        return f"it takes up to {_cuda.max_groups} param groups, not {groups}"
    driver = _cuda.driver_version()
    if driver < _cuda.needs_driver:
        return f"the driver is for CUDA {_version(driver)}; this build needs {_version(_cuda.needs_driver)}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are built for compute capability 8.0 and newer, {} has {}.{}".format(
            device, *torch.cuda.get_device_capability(device)
        )
    return None


def make_tiles(flats: Sequence[Flat]) -> Tensor:
    """The tiles of all segments as csrc/cuda/launch.h lays them out, int64 [tiles, 4], the largest first: small ones fill the gaps at the end."""
    tasks = flats[0].rows if flats[0].shared else 1
    columns, head_columns = _cuda.tile_columns(tasks, flats[0].work_dtype.itemsize)
    tiles, first = [], 0
    for flat in flats:
        most = columns if flat.shared else head_columns
        for segment in flat.segments:
            at = torch.arange(0, segment.numel, most, device="cpu")
            count = (segment.numel - at).clamp(max=most)
            place = torch.full_like(at, first | (not flat.shared) << 32)
            tiles.append(torch.stack([segment.offset + at, at, count | segment.group << 32, place], dim=1))
            first += flat.rows
    tiles = torch.cat(tiles)
    return tiles[(tiles[:, 2] & 0xFFFFFFFF).argsort(descending=True, stable=True)]


class Launcher(Passes):
    """Launches the kernel for all buffers of one device and dtype; a call is one native call."""

    on_device = True  # it can take a captured step's decisions on the device

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats, device = flats, flats[0].device
        on_gpu = device.type == "cuda"
        tiles = make_tiles(flats)
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
        shared = _buffers(flats[0]) if flats[0].shared else (0, 0, 0, 0, 0, 1)
        heads = (0, 0, 0, 0, 0, 1) if flats[-1].shared else _buffers(flats[-1])
        shared_count = len(flats[0].params) if flats[0].shared else 0
        self.plan = _cuda.Plan(
            DTYPES[flats[0].dtype], self.index, shared, heads, self.tiles.data_ptr(), max(self.num_tiles, 1), len(groups), shared_count, streams,
        )  # fmt: skip

    def __call__(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        counting = control.counting
        if not self.num_tiles and counting is None:
            return
        hyper = hyper[: self.num_groups]
        started, counts = 0, (0,) * 8
        rates = [[rate_address(rate) for rate in (h.lr, h.meta_lr)] for h in hyper]
        nonfinite = 0 if control.nonfinite is None else control.nonfinite.data_ptr()
        numbers = [
            h._replace(lr=0.0 if a else h.lr, meta_lr=1.0 if b else h.meta_lr)
            for h, (a, b) in zip(hyper, rates, strict=True)
        ]
        on_gpu = self.flats[0].device.type == "cuda"
        with torch.cuda.device(self.index if on_gpu else -1):
            if counting is not None:
                started, counts = self.flats[0].started.data_ptr(), self._counts(counting)
            elif any(h.dampening and h.momentum for h in hyper) and not all(flat.all_started for flat in self.flats):
                started = self.flags(torch.cat([flat.started.flatten() for flat in self.flats])).data_ptr()
            table = 0 if self.table is None else self.table(host_addresses(gradients), counting is not None).data_ptr()
            self.plan.step(
                gradients.address, table, started, nonfinite, numbers, [a for a, _ in rates], [b for _, b in rates],
                control.meta_update, control.reset, control.reset_momentum, control.inverse_scale, counts,
                torch.cuda.current_stream().cuda_stream if on_gpu else 0,
            )  # fmt: skip

    def _counts(self, counting: Counting) -> tuple:
        found_inf, grad_scale = (
            0 if tensor is None else tensor.data_ptr() for tensor in (counting.found_inf, counting.grad_scale)
        )
        return (
            counting.counters.data_ptr(), self.ticket.data_ptr(), found_inf, grad_scale, self.groups.data_ptr(),
            counting.horizon, counting.meta_interval, counting.advances,
        )  # fmt: skip


def _buffers(flat: Flat) -> tuple:
    pointers = [
        0 if tensor is None else tensor.data_ptr() for tensor in (flat.phi, flat.theta, flat.momentum, flat.master)
    ]
    return (*pointers, flat.theta.stride(0), flat.rows)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
