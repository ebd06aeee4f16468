"""Flat buffers: phi [P]; theta and momentum [T, P]; every parameter of the user's modules becomes a view of theta.

One `Flat` holds all tensors of one device and dtype that share a kind: the shared parameters of T tasks (rows = T, with phi), or the
head tensors of all tasks one after the other (rows = 1, no phi). Columns are the coordinates, so a kernel walks columns and sees T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

try:
    from cts_fast._cpu import prefetch_tensors
except ImportError:  # not built on this machine

    def prefetch_tensors(tensors: Sequence[Tensor]) -> None:
        """Fetch nothing."""


SEGMENT_BYTES = 128  # every tensor starts on such a boundary: wide loads, and no cache line is shared by two tensors
FETCHED = 256  # tensors whose objects are fetched before they are touched: they fit into a second cache
PAGE_BYTES, STAGGER_BYTES = 4096, 640  # rows a whole number of pages apart would fall into the same cache sets
LEAD_BYTES = 2048  # of momentum: theta and momentum of a column, of any of 16 rows, have places of their own in a page, or loads wait for stores


@dataclass
class Segment:
    """One tensor's place: columns offset … offset + numel of its `Flat`, laid out with its own dense strides."""

    group: int  # index into the optimizer's param_groups
    name: str
    params: list[Tensor]  # one replica a row
    task: int | None = None  # whose head it is; None: row r belongs to task r
    offset: int = 0
    numel: int = field(init=False)
    shape: torch.Size = field(init=False)
    stride: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.params[0]
        self.numel, self.shape = first.numel(), first.shape
        self.stride = torch.empty_like(first, device="meta").stride()

    def where(self, row: int) -> str:
        """The row's place in words, for messages: "task 3, parameter 'conv.weight'"."""
        return f"task {row if self.task is None else self.task}, parameter {self.name!r}"


class Flat:
    """phi [S], theta [R, S], momentum [R, S] of R rows, and for bfloat16 and float16 a float32 master of theta [R, S].

    Segments are padded to 128 bytes and rows are staggered, so S ≥ P; padding is zero and is never read into a parameter.
    `started[n, r]` says whether momentum of segment n, row r has taken its first gradient; where it has not, momentum is 0.
    """

    def __init__(self, segments: Sequence[Segment], shared: bool, started: Tensor | None = None) -> None:
        first = segments[0].params[0]
        self.device, self.dtype = first.device, first.dtype
        self.segments, self.shared, self.rows = list(segments), shared, len(segments[0].params)
        self.work_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        size = self.dtype.itemsize
        columns = 0
        for segment in self.segments:
            segment.offset = columns
            columns += -(-segment.numel * size // SEGMENT_BYTES) * SEGMENT_BYTES // size
        self.columns = columns
        stride = columns
        if self.rows > 1:  # the next row starts STAGGER_BYTES into a page, counted from this one
            stride = (-(-(columns * size - STAGGER_BYTES) // PAGE_BYTES) * PAGE_BYTES + STAGGER_BYTES) // size
        self.theta = self._zeros(stride, self.dtype)
        self.momentum = self._zeros(stride, self.dtype, LEAD_BYTES)
        self.master = self._zeros(stride, torch.float32) if self.work_dtype != self.dtype else None
        self.phi = torch.zeros(columns, dtype=self.work_dtype, device=self.device) if shared else None
        self.started = (
            torch.zeros(len(self.segments), self.rows, dtype=torch.uint8, device="cpu")
            if started is None
            else started.view(-1, self.rows)
        )
        self.all_started = False
        self.initialization = [self.view(self.phi, segment) for segment in self.segments] if shared else []
        # all replicas, segment by segment and row by row: the order of gradients everywhere
        self.params = [param for segment in self.segments for param in segment.params]
        written = self.params + self.initialization  # what autograd may have saved
        self._written = [tuple(written[i : i + FETCHED]) for i in range(0, len(written), FETCHED)]

    def _zeros(self, stride: int, dtype: torch.dtype, lead: int = 0) -> Tensor:
        lead //= dtype.itemsize
        return torch.zeros(lead + self.rows * stride, dtype=dtype, device=self.device)[lead:].view(self.rows, stride)[
            :, : self.columns
        ]

    def view(self, row: Tensor, segment: Segment) -> Tensor:
        """The segment of one row [S] (or of phi) in the parameter's shape, as a tensor whose storage holds nothing else.

        A storage of its own keeps `torch.save`, pickle and deepcopy of a parameter as small as the parameter.
        """
        flat = row[segment.offset : segment.offset + segment.numel].detach()
        if flat.device.type in ("cpu", "cuda"):
            with torch.cuda.device(
                flat.device if flat.is_cuda else -1
            ):  # torch exports tensors of the current device alone
                flat = torch.from_dlpack(flat)
        return flat.as_strided(segment.shape, segment.stride)

    @property
    def work_theta(self) -> Tensor:
        """theta [R, S] in the precision that the step computes in."""
        return self.theta if self.master is None else self.master

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The parts of rows [R, S] in the parameters' shapes, segment by segment and row by row: views."""
        return [
            row.as_strided(segment.shape, segment.stride, row.storage_offset() + segment.offset)
            for segment in self.segments
            for row in rows
        ]

    def state(self, n: int, row: int) -> dict[str, Tensor]:
        """Live views of everything that belongs to the parameter of segment n, row `row`."""
        segment = self.segments[n]
        views = {
            "theta": self.view(self.work_theta[row], segment),
            "momentum_buffer": self.view(self.momentum[row], segment),
            "momentum_started": self.started[n, row],
        }
        if self.shared and row == 0:
            views["initialization"] = self.initialization[n]
        return views

    def check_param(self, segment: Segment, row: int) -> None:
        """Raise ValueError if the user cast, moved or reshaped a parameter after the optimizer was made."""
        param = segment.params[row]
        if param.shape != segment.shape or param.dtype != self.dtype or param.device != self.device:
            raise ValueError(
                f"{segment.where(row)}: was {self.dtype} {tuple(segment.shape)} on {self.device} when the optimizer was made and is "
                f"{param.dtype} {tuple(param.shape)} on {param.device} now; move or cast modules before making the optimizer"
            )

    def adopt_(self, n: int, row: int) -> None:
        """Take over the values of a parameter that lives elsewhere and make it a view of theta."""
        segment = self.segments[n]
        self.check_param(segment, row)
        param = segment.params[row]
        view = self.view(self.theta[row], segment)
        view.copy_(param.detach().clone())  # it may be the same memory in another order
        if self.master is not None:
            self.view(self.master[row], segment).copy_(view)
        param.data = view

    def hear_(self, columns: slice = slice(None)) -> None:
        """Low precision: where somebody wrote the parameter since it was rounded from the master, the master follows."""
        if self.master is not None:
            master, stored = self.master[:, columns], self.theta[:, columns]
            master.copy_(torch.where(master.to(self.dtype) == stored, master, stored.to(master.dtype)))

    def note_write(self) -> None:
        """Let autograd hear that the parameters and φ are written behind its back, so that a graph which saved one notices."""
        for tensors in self._written:
            prefetch_tensors(tensors)
            torch.autograd.graph.increment_version(tensors)

    def clear_momentum_(self) -> None:
        """Momentum 0, and the next gradient is a first one again."""
        self.momentum.zero_()
        self.forget_started_()

    def forget_started_(self) -> None:
        """The next gradient of every momentum buffer is its first."""
        self.started.zero_()
        self.all_started = False

    def reset_(self, clear_momentum: bool) -> None:
        """theta ← phi in every row (and v ← 0)."""
        self.theta.copy_(self.phi)
        if self.master is not None:
            self.master.copy_(self.phi)
        if clear_momentum:
            self.clear_momentum_()


def make_flats(kinds: Mapping[bool, Sequence[Segment]], capturable: bool) -> list[Flat]:
    """The buffers of one device and dtype, by "shared": shared parameters first, then heads.

    Their `started` flags lie one after another in the order of gradients, on the device if capturable.
    """
    kinds = {shared: kinds[shared] for shared in (True, False) if shared in kinds}
    counts = [len(segments) * len(segments[0].params) for segments in kinds.values()]
    device = next(iter(kinds.values()))[0].params[0].device if capturable else "cpu"
    started = torch.zeros(sum(counts), dtype=torch.uint8, device=device).split(counts)
    return [Flat(segments, shared, part) for (shared, segments), part in zip(kinds.items(), started, strict=True)]
