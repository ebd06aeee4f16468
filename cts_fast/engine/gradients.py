"""Gradients as autograd left them: checked, and their addresses in one table for native kernels, without a copy.

The table is filled in C (csrc/python/gradients.cpp) where the native module is built and torch has DLPack's C
functions, else in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from cts_fast.engine.layout import Flat, Segment, address_in, is_without_memory, only_looks_dense
from cts_fast.engine.native import load

try:
    GradientTable, same_objects = load("_cpu").GradientTable, load("_cpu").same_objects
except ImportError:  # not built on this machine, or broken, which the choice of a backend reports
    GradientTable = None

    def same_objects(a: Sequence, b: Sequence) -> bool:
        """Whether two lists hold the very same objects."""
        return len(a) == len(b) and all(map(is_, a, b))


class NonFiniteGradient(RuntimeError):
    """With nonfinite="raise": a gradient held a NaN or an infinity. task: index of the task; parameter: its name."""

    def __init__(self, task: int, parameter: str) -> None:
        super().__init__(
            f"task {task}, parameter {parameter!r}: the gradient of the last step held a NaN or an infinity; that step "
            "was applied"
        )
        self.task, self.parameter = task, parameter


class Gradients(Sequence):
    """Every replica's gradient, flat by flat, segment by segment and row by row; None where there is none.

    present: how many there are. address: of the table of their addresses in host memory, one pointer each, null for
    None. Valid until the next call of the same `Collector`.
    """

    __slots__ = ("tensors", "present", "address", "table")

    def __init__(self, tensors: list[Tensor | None], present: int, address: int) -> None:
        self.tensors, self.present, self.address = tensors, present, address

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Gradients:
        """Other tensors in the gradients' place, each laid out as its parameter."""
        table = torch.tensor(
            [0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu"
        )
        gradients = cls(tensors, sum(tensor is not None for tensor in tensors), table.data_ptr())
        gradients.table = table  # lives as long as its address is in use
        return gradients

    def __getitem__(self, index):
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self.tensors)


class Collector:
    """Collects the gradients of the buffers of one device and dtype; `moved`: parameters that are not where they should
    be.
    """

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.places = [(flat, n, row) for flat in flats for n in range(len(flat.segments)) for row in range(flat.rows)]
        self.params = [param for flat in flats for param in flat.params]
        self.addresses = [address_in(flat.theta[row], flat.segments[n]) for flat, n, row in self.places]
        self.table = _native_table(self, flats[0].theta) or PythonTable(self)
        self.moved: list[int] = []

    def __call__(self, given: list[Tensor | None] | None = None) -> Gradients:
        """All gradients, dense in their parameters' memory order: the parameters' own, or those of a list in their
        place.

        Raises ValueError naming task and parameter, before anything moved, for sparse gradients and those of other
        kinds or devices.
        """
        tensors, count, odd, self.moved = self.table.collect(self.params, given)
        for i in odd:
            tensors[i] = dense = _dense(tensors[i], *self.places[i])
            self.table.enter(i, dense.data_ptr())
        return Gradients(tensors, count, self.table.address)

    def find_moved(self) -> list[int]:
        """The parameters whose storage was exchanged (`p.data = …`, deepcopy, share_memory_), by their index."""
        return [i for i, place in enumerate(self.places) if self._moved(i, *place)]

    def _moved(self, i: int, flat: Flat, n: int, row: int) -> bool:
        segment = flat.segments[n]
        param, address = segment.params[row], self.addresses[i]
        return (
            param.dtype != flat.dtype
            or param.shape != segment.shape
            or (address != 0 and (param.data_ptr() != address or param.stride() != segment.stride))
        )


class PythonTable:
    """What csrc/python/gradients.cpp does, in Python: the addresses of the gradients of a collector's parameters."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._addresses = torch.zeros(len(collector.params), dtype=torch.int64, device="cpu")
        self.address = self._addresses.data_ptr()

    def collect(
        self, params: list[Tensor], given: list[Tensor | None] | None
    ) -> tuple[list[Tensor | None], int, list[int], list[int]]:
        """(gradients, how many, those that are not plain, parameters that moved)."""
        tensors = [param.grad for param in params] if given is None else list(given)
        present = [(i, gradient) for i, gradient in enumerate(tensors) if gradient is not None]
        odd = []
        self._addresses.zero_()
        for i, gradient in present:
            if _plain(gradient, *self._collector.places[i]):
                self._addresses[i] = gradient.data_ptr()
            else:
                odd.append(i)
        return tensors, len(present), odd, self._collector.find_moved()

    def enter(self, i: int, address: int) -> None:
        """Enter the address of a gradient that was made dense."""
        self._addresses[i] = address


def _native_table(collector: Collector, like: Tensor):
    if (
        GradientTable is None
        or not hasattr(Tensor, "__dlpack_c_exchange_api__")
        or like.device.type not in ("cpu", "cuda")
    ):
        return None
    layouts = [(tuple(flat.segments[n].shape), flat.segments[n].stride) for flat, n, _ in collector.places]
    return GradientTable(collector.addresses, layouts, like, torch._neg_view(torch.ones(2, device="cpu")))


def _plain(gradient: Tensor, flat: Flat, n: int, row: int) -> bool:
    return (
        type(gradient) is Tensor
        and gradient.layout == torch.strided
        and gradient.dtype == flat.dtype
        and gradient.device == flat.device
        and gradient.shape == flat.segments[n].shape
        and gradient.stride() == flat.segments[n].stride
        and not gradient.is_neg()
        and not gradient._is_zerotensor()
    )


def _dense(gradient: Any, flat: Flat, n: int, row: int) -> Tensor:
    """A gradient's values as the kernels read them; a floating dtype that torch.optim.SGD would take is rounded to the
    parameter's.
    """
    segment: Segment = flat.segments[n]
    where = segment.where(row)
    flat.check_param(segment, row)
    if gradient.layout != torch.strided:
        raise ValueError(f"{where}: gradient is {gradient.layout}; the step takes dense gradients (use sparse=False)")
    if only_looks_dense(gradient):
        raise ValueError(f"{where}: gradient is a {type(gradient).__name__}; the step takes plain dense tensors")
    if not gradient.is_floating_point() or gradient.device != flat.device or gradient.shape != segment.shape:
        raise ValueError(
            f"{where}: gradient is {gradient.dtype} {tuple(gradient.shape)} on {gradient.device}, "
            f"the parameter {flat.dtype} {tuple(segment.shape)} on {flat.device}"
        )
    if is_without_memory(gradient) and not gradient._is_zerotensor():
        raise ValueError(f"{where}: gradient has no memory; its storage was freed")
    values = torch.empty_strided(segment.shape, segment.stride, dtype=flat.dtype, device=flat.device)
    return values.copy_(gradient.detach())
