"""The few numbers that come with every all-reduce, from which all ranks read the same verdict.

They are small whole numbers, whose sums are exact:

    FAILED, MOVED, MEETING, LOADED, NONFINITE, FOUND_INF    on how many ranks
    two words of 32 bits                                    what step this is, and once a round a digest of φ

A word travels in pieces d of four bits, each with its square: R ranks have the same one exactly where R Σd² = (Σd)².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FAILED, MOVED, MEETING, LOADED, NONFINITE, FOUND_INF = range(6)
COUNTS = 6
SHIFTS = range(0, 32, 4)  # of a word's pieces
WORD = 2 * len(SHIFTS)
FLAGS = COUNTS + 2 * WORD


def write(flags: Tensor, counts: dict[int, bool], step: int | None) -> None:
    """Flags [FLAGS] of a rank: what it counts for, and the word of its step; None: it takes none, and has no digest."""
    pieces = [0] * len(SHIFTS) if step is None else [step >> shift & 15 for shift in SHIFTS]
    on_host = [float(counts.get(i, False)) for i in range(COUNTS)]
    on_host += [*pieces, *(d * d for d in pieces), *[0] * WORD]
    flags.copy_(torch.tensor(on_host, dtype=flags.dtype, device="cpu"), non_blocking=True)


def write_digest(flags: Tensor, digest: Tensor) -> None:
    """The second word, which lies where the flags do."""
    d = digest >> torch.arange(0, 32, 4, device=flags.device) & 15
    flags[-WORD:] = torch.cat([d, d * d])


def same_words(flags: Sequence[float], ranks: int) -> tuple[bool, bool]:
    """Whether so many ranks are at the same step, and have the same digest."""
    step, digest = flags[COUNTS : COUNTS + WORD], flags[COUNTS + WORD :]
    return _same(step, ranks), _same(digest, ranks)


def _same(word: Sequence[float], ranks: int) -> bool:
    half = len(SHIFTS)
    return all(ranks * square == total * total for total, square in zip(word[:half], word[half:], strict=True))
