"""Flat buffers: φ [P]; θ and optimizer state, T rows of P; every parameter of the user's modules becomes a view of θ.

One `Flat` holds all tensors of one device and dtype that share a kind: the shared parameters of T tasks (rows = T, with
phi), or the head tensors of all tasks one after the other (rows = 1, no phi). Columns are the coordinates, so a kernel
walks columns and sees T rows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cts_fast.engine.native import load
from cts_fast.engine.rules.sgd import STATE

try:
    prefetch_tensors = load("_cpu").prefetch_tensors
except ImportError:  # not built on this machine, or broken

    def prefetch_tensors(tensors: Sequence[Tensor]) -> None:
        """Fetch nothing."""


SEGMENT_BYTES = 128  # every tensor starts on such a boundary: wide loads, and no cache line is shared by two tensors
FETCHED = 256  # tensors whose objects are fetched before they are touched: they fit into a second cache
PAGE_BYTES, STAGGER_BYTES = 4096, 640  # rows a whole number of pages apart would fall into the same cache sets
# of momentum: theta and momentum of a column, of any of 16 rows, have places of their own in a page,
# or loads wait for stores
LEAD_BYTES = 2048
MOMENTUM = STATE[0]
TORCHS_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


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

    @property
    def columns(self) -> slice:
        """Its place in a row."""
        return slice(self.offset, self.offset + self.numel)

    def where(self, row: int) -> str:
        """The row's place in words, for messages: "task 3, parameter 'conv.weight'"."""
        return f"task {row if self.task is None else self.task}, parameter {self.name!r}"


def make_segments(groups: Sequence[dict]) -> list[Segment]:
    """One segment for each shared tensor of all tasks and for each head tensor, in the order of the groups.

    Raises ValueError for two shared parameters of one name.
    """
    segments, shared = [], 0
    for g, group in enumerate(groups):
        params, names, sizes = group["params"], group.get("param_names"), group["sizes"]
        starts = [0, *accumulate(sizes)][: len(sizes)]
        if group["shared"]:
            for n in range(sizes[0] if sizes else 0):
                name = plain_name(names[n]) if names else str(shared)
                segments.append(Segment(g, name, [params[start + n] for start in starts]))
                shared += 1
            continue
        for t, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            for n in range(size):
                name = plain_name(names[start + n]) if names else f"head.{n}"
                segments.append(Segment(g, name, [params[start + n]], task=t))
    seen = set()
    for segment in segments:
        if segment.task is None:
            if segment.name in seen:
                raise ValueError(
                    f"parameter {segment.name!r}: two shared parameters have that name; "
                    "names of the initialization must differ"
                )
            seen.add(segment.name)
    return segments


def by_kind(segments: Sequence[Segment]) -> dict[tuple[torch.device, torch.dtype], dict[bool, list[Segment]]]:
    """Device and dtype → "shared" → their segments."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[bool, list[Segment]]] = {}
    for segment in sorted(segments, key=lambda one: one.task is not None):  # heads have no say in the order of kinds
        first = segment.params[0]
        kinds.setdefault((first.device, first.dtype), {}).setdefault(segment.task is None, []).append(segment)
    return kinds


def plain_name(name: str) -> str:
    """A parameter's name without what torch's wrappers put into it, so that it is the name in the plain module."""
    return ".".join(part for part in name.split(".") if part not in TORCHS_WRAPPERS)


class Flat:
    """phi [S], theta [R, S], momentum [R, S] of R rows, and for bfloat16 and float16 a float32 master of theta [R, S].

    Segments are padded to 128 bytes and rows are staggered, so S ≥ P; padding is zero and is never read into a
    parameter. `started[n, r]` says whether momentum of segment n, row r has taken its first gradient; where it has not,
    momentum is 0.
    own: further buffers that a method keeps beside these, in phi's dtype: name → [R, S] ("task"), [S] ("shared"), or
    [R, S] that begins at theta ("point").
    """

    def __init__(
        self, segments: Sequence[Segment], shared: bool, started: Tensor, own: Mapping[str, str] | None = None
    ) -> None:
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
        # a tensor for shared parameters, None for heads, which never ask for it
        self.phi: Any = torch.zeros(columns, dtype=self.work_dtype, device=self.device) if shared else None
        self.started = started.view(-1, self.rows)
        self.all_started = False
        self.initialization = [self.view(self.phi, segment) for segment in self.segments] if shared else []
        self.own = {
            name: torch.zeros_like(self.phi if kind == "shared" else self.theta, dtype=self.work_dtype)
            for name, kind in (own or {}).items()
            if shared and kind != "number"
        }
        self.points = {name for name, kind in (own or {}).items() if shared and kind == "point"}
        # all replicas, segment by segment and row by row: the order of gradients everywhere
        self.params = [param for segment in self.segments for param in segment.params]
        self.memory: list[StorageWeakRef | None] = [None] * len(self.params)  # what each parameter was bound to
        self._written: list[tuple[Tensor, ...]] = []

    def _zeros(self, stride: int, dtype: torch.dtype, lead: int = 0) -> Tensor:
        lead //= dtype.itemsize
        memory = torch.zeros(lead + self.rows * stride, dtype=dtype, device=self.device)
        return memory[lead:].view(self.rows, stride)[:, : self.columns]

    def view(self, row: Tensor, segment: Segment) -> Tensor:
        """The segment of one row [S] (or of phi) in the parameter's shape, as a tensor whose storage holds nothing
        else.

        A storage of its own keeps `torch.save`, pickle and deepcopy of a parameter as small as the parameter.
        It is no view in autograd's sense: such a one holds what it was cut from, also after its `.data` is exchanged.
        """
        flat = row[segment.columns].detach()
        if flat.device.type in ("cpu", "cuda"):
            with torch.cuda.device(
                flat.device if flat.is_cuda else -1
            ):  # torch exports tensors of the current device alone
                flat = torch.from_dlpack(flat)
        return flat.as_strided(segment.shape, segment.stride).data

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
            MOMENTUM: self.view(self.momentum[row], segment),
            "momentum_started": self.started[n, row],
        }
        if self.shared and row == 0:
            views["initialization"] = self.view(self.phi, segment)
        for name, buffer in self.own.items():
            if buffer.dim() == 2 or row == 0:
                views[name] = self.view(buffer[row] if buffer.dim() == 2 else buffer, segment)
        return views

    def addresses(self, n: int, row: int) -> dict[str, int]:
        """Where the views of `state` lie; empty ones lie nowhere."""
        segment = self.segments[n]
        if not segment.numel:
            return {}
        rows = {"theta": self.work_theta[row], MOMENTUM: self.momentum[row]}
        if self.shared and row == 0:
            rows["initialization"] = self.phi
        for name, buffer in self.own.items():
            if buffer.dim() == 2 or row == 0:
                rows[name] = buffer[row] if buffer.dim() == 2 else buffer
        found = {name: address_in(buffer, segment) for name, buffer in rows.items()}
        return {**found, "momentum_started": self.started.data_ptr() + n * self.rows + row}

    def like(self, n: int, name: str, view: Tensor) -> Tensor:
        """A tensor of the shape, dtype and device that a view of `state` has by definition."""
        if name not in ("theta", MOMENTUM, "initialization", *self.own):
            return view
        shape, dtype = self.segments[n].shape, self.dtype if name == MOMENTUM else self.work_dtype
        return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=self.device)

    def is_phi_moved(self) -> bool:
        """Whether the memory of a view of φ was exchanged."""
        return any(
            view.data_ptr() != address for view, address in zip(self.initialization, self._phi_addresses, strict=True)
        )

    def is_at_phi(self) -> bool:
        """Whether θ is φ in every row, bit for bit; waits for the device, once."""
        bits = torch.int64 if self.work_dtype == torch.float64 else torch.int32
        phi = self.phi.view(bits)
        if self.device.type == "cpu":  # ends at the first difference, without memory of its own
            return all(torch.equal(row.view(bits), phi) for row in self.work_theta)
        return bool(torch.stack([row.view(bits).eq(phi).all() for row in self.work_theta]).all())

    def follow_replicas_(self, kept: Container[Tensor]) -> str | None:
        """φ ← θ for each tensor that is the same in every row; the first place where rows differ from φ and each other,
        in words.

        kept: views of φ that stay as they are, whatever their rows hold.
        """
        differs = None
        parts = iter(self.parts(self.work_theta))
        for phi, segment in zip(self.initialization, self.segments, strict=True):
            rows = [next(parts) for _ in range(self.rows)]
            if phi in kept:
                continue
            differing = [row for row, theta in enumerate(rows) if not theta.equal(rows[0])]
            if not differing:
                phi.copy_(rows[0])
            elif differs is None:
                differs = segment.where(differing[0])
        return differs

    def follow_phi_(self, written: Container[Tensor]) -> None:
        """θ ← φ in every row of the tensors whose views of φ are among those written."""
        for phi, segment in zip(self.initialization, self.segments, strict=True):
            if phi in written:
                for buffer in (self.work_theta, self.theta):
                    buffer[:, segment.columns] = self.phi[segment.columns]

    def check_param(self, segment: Segment, row: int) -> None:
        """Raise ValueError for a parameter that was cast, moved, reshaped or put into shared memory after the optimizer
        was made.
        """
        param = segment.params[row]
        if param.shape != segment.shape or param.dtype != self.dtype or param.device != self.device:
            raise ValueError(
                f"{segment.where(row)}: was {self.dtype} {tuple(segment.shape)} on {self.device} when the optimizer "
                f"was made and is {param.dtype} {tuple(param.shape)} on {param.device} now; move or cast modules "
                "before making the optimizer"
            )
        if is_without_memory(param):
            raise ValueError(f"{segment.where(row)}: has no memory now; its storage was freed")
        refuse_shared(param, segment.where(row))

    def adopt_(self, n: int, row: int, values: Tensor) -> None:
        """Take over a parameter's values, which lie elsewhere, and bind the parameter to its place in theta."""
        segment = self.segments[n]
        view = self.view(self.theta[row], segment)
        view.copy_(values.detach().clone())  # it may be the same memory in another order
        if self.master is not None:
            master = self.view(self.master[row], segment)
            master.copy_(torch.where(master.to(self.dtype) == view, master, view.to(master.dtype)))
        segment.params[row].data = view
        self.memory[n * self.rows + row] = StorageWeakRef(view.untyped_storage())

    def is_held(self, n: int, row: int) -> bool:
        """Whether somebody holds the memory that the parameter was bound to: a backup made by `p.data`, say."""
        memory = self.memory[n * self.rows + row]
        return memory is not None and not memory.expired()

    def is_laid_out_otherwise(self, n: int, row: int) -> bool:
        """Whether the first task's parameter has other strides than its place, as after `to(memory_format=…)`."""
        segment = self.segments[n]
        return row == 0 and torch.empty_like(segment.params[0], device="meta").stride() != segment.stride

    def start_at_(self, phi: Tensor) -> list[Segment]:
        """φ ← phi [S], and θ ← φ in every row of the tensors that differ from it in a bit, which are returned."""
        changed = []
        for segment in self.segments:
            columns = segment.columns
            if not torch.equal(self.phi[columns].view(torch.int32), phi[columns].view(torch.int32)):
                for buffer in (self.phi, self.work_theta, self.theta):
                    buffer[..., columns] = phi[columns]
                changed.append(segment)
        return changed

    def follow_parameters_(self, columns: slice = slice(None)) -> None:
        """Low precision: where somebody wrote a parameter since it was rounded from its master, the master follows."""
        if self.master is not None:
            master, stored = self.master[:, columns], self.theta[:, columns]
            master.copy_(torch.where(master.to(self.dtype) == stored, master, stored.to(master.dtype)))

    def note_written(self) -> None:
        """Gather what autograd may have saved, when all parameters and views of φ are in place."""
        written = self.params + self.initialization
        self._written = [tuple(written[i : i + FETCHED]) for i in range(0, len(written), FETCHED)]
        self._phi_addresses = [address_in(self.phi, segment) for segment in self.segments] if self.shared else []

    def note_write(self) -> None:
        """Note for autograd that the parameters and φ are written behind its back, so that a graph which saved one
        notices.
        """
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


def only_looks_dense(tensor: Tensor) -> bool:
    """Whether a tensor's class answers torch's ops itself (DTensor, FakeTensor, …): its memory is not here."""
    return getattr(type(tensor), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)


def is_without_memory(tensor: Tensor) -> bool:
    """Whether a tensor that should hold numbers has no memory: a freed storage, or torch's zeros without one."""
    return tensor.numel() > 0 and tensor.device.type != "meta" and tensor.data_ptr() == 0


def address_in(row: Tensor, segment: Segment) -> int:
    """Where a segment of one row [S] lies; 0 for an empty one, which lies nowhere."""
    return row.data_ptr() + segment.offset * row.itemsize if segment.numel else 0


def refuse_shared(tensor: Tensor, what: str) -> None:
    """Raise ValueError for a tensor in memory that processes share: the step works in memory of its own, so they would
    part.
    """
    if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_shared():
        raise ValueError(
            f"{what}: lies in memory shared with other processes, which the flat buffers cannot follow; "
            "send or share a clone() instead (x.data = x.data.clone() takes this one out of it)"
        )


def make_flats(
    kinds: Mapping[bool, Sequence[Segment]], capturable: bool, own: Mapping[str, str] | None = None
) -> list[Flat]:
    """The buffers of one device and dtype, by "shared": shared parameters first, then heads.

    Their `started` flags lie one after another in the order of gradients, on the device if capturable.
    """
    kinds = {shared: kinds[shared] for shared in (True, False) if shared in kinds}
    counts = [len(segments) * len(segments[0].params) for segments in kinds.values()]
    device = next(iter(kinds.values()))[0].params[0].device if capturable else "cpu"
    started = torch.zeros(sum(counts), dtype=torch.uint8, device=device).split(counts)
    return [Flat(segments, shared, part, own) for (shared, segments), part in zip(kinds.items(), started, strict=True)]
