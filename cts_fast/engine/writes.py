"""Writes to φ that are not the optimizer's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cts_fast.engine.layout import SEGMENT_BYTES, Flat


class Writes:
    """Which views of φ somebody else has written to since they were noted.

    Autograd counts the writes to a tensor, but none through its `.data` or NumPy; so once views were handed out, the
    bits of φ are summed too, for each 128 bytes, of which no two tensors share any.
    """

    def __init__(self) -> None:
        self.flats: list[Flat] = []
        self.versions: list[int] = []  # of all views, buffer by buffer
        self.sums: list[Tensor] | None = None  # of each buffer; None: no view was handed out yet

    def note(self, flats: Iterable[Flat]) -> None:
        """From here on a write to a view of these buffers' φ is somebody else's."""
        self.flats = [*flats]
        self.note_counts()
        if self.sums is not None:
            self.sums = [_sums_of_bits(flat) for flat in self.flats]

    def note_counts(self) -> None:
        """The same of the writes that autograd counts, which costs no look at the memory."""
        self.versions = [view._version for flat in self.flats for view in flat.initialization]

    def follow(self, flats: Iterable[Flat]) -> None:
        """Other buffers from here on; what was noted of views that stay goes on."""
        before = {view: (version, sums) for view, version, sums in self._noted()}
        self.note(flats)
        for i, (view, version, sums) in enumerate(self._noted()):
            self.versions[i], old = before.get(view, (version, None))
            if sums is not None and old is not None:
                sums.copy_(old)

    def hand_out(self) -> None:
        """Somebody is about to see the views, and may write to them."""
        if self.sums is None:
            self.sums = [_sums_of_bits(flat) for flat in self.flats]

    def counted(self) -> set[Tensor]:
        """The views that somebody else has written to in a way that autograd counts."""
        views = (view for flat in self.flats for view in flat.initialization)
        return {view for view, version in zip(views, self.versions, strict=True) if view._version != version}

    def written(self) -> set[Tensor]:
        """The views that somebody else has written to in any way; waits for the device where they were handed out."""
        found = self.counted()
        for flat, sums in zip(self.flats, self.sums or (), strict=False):
            differs = _sums_of_bits(flat).ne(sums)
            if differs.any():
                found.update(view for view, words in _words(flat) if differs[words].any())
        return found

    def _noted(self) -> Iterator[tuple[Tensor, int, Tensor | None]]:
        """Each view, its version, and the sums of its bits."""
        versions, sums = iter(self.versions), self.sums or [None] * len(self.flats)
        for flat, own in zip(self.flats, sums, strict=True):
            for view, words in _words(flat):
                yield view, next(versions), None if own is None else own[words]


def _words(flat: Flat) -> Iterator[tuple[Tensor, slice]]:
    """Each view of φ, and where the sums of its bits stand."""
    size = flat.work_dtype.itemsize
    for view, segment in zip(flat.initialization, flat.segments, strict=True):
        columns = segment.columns
        yield view, slice(columns.start * size // SEGMENT_BYTES, -(-columns.stop * size // SEGMENT_BYTES))


def _sums_of_bits(flat: Flat) -> Tensor:
    """Of each 128 bytes of φ a number that a write of other values changes; not waited for."""
    with torch.inference_mode(False):
        words = flat.phi.view(torch.int64)
        weights = torch.arange(1, SEGMENT_BYTES // 4, 2, device=words.device)  # they tell other orders apart
        return (words.view(-1, SEGMENT_BYTES // 8) * weights).sum(1) if len(words) else words
