"""Gradients as autograd left them: checked, and their addresses in one table for native kernels, without a copy.

The table is filled in C (csrc/python/gradients.cpp) where the native module is built and torch has DLPack's C functions, else in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cts_fast.engine.layout import Flat, Segment

try:
    from cts_fast._cpu import GradientTable
except ImportError:  # not built on this machine
    GradientTable = None


class Gradients(Sequence):
    """Every replica's gradient, flat by flat, segment by segment and row by row; None where there is none.

    count: how many there are. address: of the table of their addresses in host memory, one pointer each, null for None.
    changed: whether the table differs from the one before (False is certain). Valid until the next call of the same `Collector`.
    """

    __slots__ = ("tensors", "count", "address", "changed", "table")

    def __init__(self, tensors: list[Tensor | None], count: int, address: int, changed: bool) -> None:
        self.tensors, self.count, self.address, self.changed = tensors, count, address, changed

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Gradients:
        """Other tensors in the gradients' place, each laid out as its parameter."""
        table = torch.tensor(
            [0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu"
        )
        gradients = cls(tensors, sum(tensor is not None for tensor in tensors), table.data_ptr(), True)
        gradients.table = table  # lives as long as its address is in use
        return gradients

    def __getitem__(self, index):
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self.tensors)


class Collector:
    """Collects the gradients of the buffers of one device and dtype, and takes exchanged parameters back into them."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.places = [(flat, n, row) for flat in flats for n in range(len(flat.segments)) for row in range(flat.rows)]
        self.params = [param for flat in flats for param in flat.params]
        self.addresses = [_address(*place) for place in self.places]
        like = flats[0].theta
        if (
            GradientTable is not None
            and hasattr(Tensor, "__dlpack_c_exchange_api__")
            and like.device.type in ("cpu", "cuda")
        ):
            layouts = [(tuple(flat.segments[n].shape), flat.segments[n].stride) for flat, n, _ in self.places]
            self.table = GradientTable(self.params, self.addresses, layouts, like)
            self.collect, self.set, self.address = self.table.collect, self.table.set, self.table.address
        else:
            self.table = torch.zeros(len(self.params), dtype=torch.int64, device="cpu")
            self.collect, self.set, self.address = self._collect, self.table.__setitem__, self.table.data_ptr()

    def __call__(self, given: list[Tensor | None] | None = None) -> Gradients:
        """All gradients, dense in their parameters' memory order: the parameters' own, or those of a list in their place.

        Parameters whose storage was exchanged (`p.data = …`, deepcopy, share_memory_) are taken back into the flat buffers first.
        Raises ValueError naming task and parameter, before anything moved, for sparse gradients and other dtypes or devices.
        """
        tensors, count, changed, odd, moved = self.collect(given)
        for i in odd:
            tensors[i] = _dense(tensors[i], *self.places[i])
            self.set(i, tensors[i].data_ptr())
        for i in moved:
            flat, n, row = self.places[i]
            flat.check_param(flat.segments[n], row)
        for i in moved:
            flat, n, row = self.places[i]
            flat.adopt_(n, row)
        return Gradients(tensors, count, self.address, changed or bool(odd))

    def _collect(
        self, given: list[Tensor | None] | None = None
    ) -> tuple[list[Tensor | None], int, bool, list[int], list[int]]:
        """What GradientTable.collect does."""
        tensors = [param.grad for param in self.params] if given is None else list(given)
        present = [i for i, gradient in enumerate(tensors) if gradient is not None]
        odd = [i for i in present if not _plain(tensors[i], *self.places[i])]
        moved = [i for i, place in enumerate(self.places) if _moved(*place)]
        self.table.zero_()
        for i in set(present) - set(odd):
            self.table[i] = tensors[i].data_ptr()
        return tensors, len(present), True, odd, moved


def check_moved(flat: Flat) -> None:
    """Raise ValueError, naming task and parameter, if one was cast, moved to another device or reshaped."""
    for segment in flat.segments:
        for row in range(flat.rows):
            flat.check_param(segment, row)


def adopt_moved_(flat: Flat) -> None:
    """Take parameters whose storage was exchanged back into the flat buffer."""
    for n, segment in enumerate(flat.segments):
        for row in range(len(segment.params)):
            if _moved(flat, n, row):
                flat.adopt_(n, row)


def _moved(flat: Flat, n: int, row: int) -> bool:
    param, address = flat.segments[n].params[row], _address(flat, n, row)
    return address != 0 and (param.data_ptr() != address or param.stride() != flat.segments[n].stride)


def _address(flat: Flat, n: int, row: int) -> int:
    """Where the parameter of segment n, row `row` lies; 0 for an empty one, which lies nowhere."""
    segment = flat.segments[n]
    columns = row * flat.theta.stride(0) + segment.offset
    return flat.theta.data_ptr() + columns * flat.dtype.itemsize if segment.numel else 0


def _plain(gradient: Tensor, flat: Flat, n: int, row: int) -> bool:
    return (
        gradient.layout == torch.strided
        and gradient.dtype == flat.dtype
        and gradient.device == flat.device
        and gradient.shape == flat.segments[n].shape
        and gradient.stride() == flat.segments[n].stride
        and not gradient.is_neg()
    )


def _dense(gradient: Tensor, flat: Flat, n: int, row: int) -> Tensor:
    segment: Segment = flat.segments[n]
    flat.check_param(segment, row)
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{segment.where(row)}: gradient is {gradient.layout}; the step takes dense gradients (use sparse=False)"
        )
    if gradient.dtype != flat.dtype or gradient.device != flat.device:
        raise ValueError(
            f"{segment.where(row)}: gradient is {gradient.dtype} on {gradient.device}, the parameter {flat.dtype} on {flat.device}"
        )
    return torch.empty_strided(segment.shape, segment.stride, dtype=flat.dtype, device=flat.device).copy_(
        gradient.detach()
    )
