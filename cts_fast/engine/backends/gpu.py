"""What both GPU backends need: how tensors are cut into tiles, and which GPUs the kernels run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cts_fast.engine.layout import Flat, Segment


def make_tiles(
    flats: Sequence[Flat],
    columns: Callable[[Flat], int],
    entries: Callable[[Flat, Segment, Tensor, int], Sequence[Tensor]],
) -> Tensor:
    """All segments, cut into tiles of at most `columns(flat)` columns, in order; int64 [tiles, entries], on the host.

    entries: a tile's entries in the kernel's order, each [tiles], from flat, segment, where in the segment the tiles
    begin, and the index of the gradient of the segment's first row.
    """
    tiles, first = [], 0
    for flat in flats:
        for segment in flat.segments:
            at = torch.arange(0, segment.numel, columns(flat), device="cpu")
            tiles.append(torch.stack(tuple(entries(flat, segment, at, first)), dim=1))
            first += flat.rows
    return torch.cat(tiles)


def too_old(device: torch.device) -> str | None:
    """Why an NVIDIA GPU cannot run the kernels, which are for compute capability 8.0 and newer; None if it can."""
    found = torch.cuda.get_device_capability(device)
    if found >= (8, 0):
        return None
    return f"its kernels need compute capability 8.0 or newer; {device} has {found[0]}.{found[1]}"
