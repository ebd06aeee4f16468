"""What both GPU backends need: how tensors are cut into tiles, and which GPUs the kernels run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cts_fast.engine.layout import Flat, Segment


def tile_starts(flats: Sequence[Flat], columns: Callable[[Flat], int]) -> Iterator[tuple[Flat, Segment, Tensor, int]]:
    """Every segment, cut into tiles of at most `columns(flat)` columns: (flat, segment, where in the segment each tile
    begins, int64 on the host, index of its first row's gradient).
    """
    first = 0
    for flat in flats:
        for segment in flat.segments:
            yield flat, segment, torch.arange(0, segment.numel, columns(flat), device="cpu"), first
            first += flat.rows


def too_old(device: torch.device) -> str | None:
    """Why an NVIDIA GPU cannot run the kernels, which are for compute capability 8.0 and newer; None if it can."""
    found = torch.cuda.get_device_capability(device)
    if found >= (8, 0):
        return None
    return f"its kernels need compute capability 8.0 or newer; {device} has {found[0]}.{found[1]}"
