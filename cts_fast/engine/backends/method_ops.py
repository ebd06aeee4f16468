"""What methods of `cts_fast.baselines` do beside the step, in torch ops; a backend may have faster ways (the cpu
backend has).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper


class PathPoint(NamedTuple):
    """A sum along the tasks' paths, taken in the pass of the step that leaves a point.

    total ← total + Σ_t w_t ((θ_t^kept − θ_t) − c_t g_t^kept); then, if `keeps`, θ^kept ← θ and g^kept ← scale ·
    gradients.
    """

    total: Tensor  # [S]
    theta: Tensor  # [T, S]: θ^kept
    gradient: Tensor  # [T, S]: g^kept
    weights: Sequence[float]  # w of each task; none: no segment ends here
    changes: Sequence[float]  # c of each task
    scale: float
    keeps: bool


class MethodOps:
    """Torch ops on `flats[0]`, the shared parameters: T rows of S columns.

    Buffers of a method are in phi's dtype: [S] laid out as phi, [T, S] laid out as theta. Gradients come as a
    `Collector` collects them: dense, segment by segment and row by row, None where there is none.
    """

    flats: Sequence[Flat]

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        """The step; see `Backend`."""
        raise NotImplementedError

    def reset_(self, clear_momentum: bool) -> None:
        """θ_t ← φ for every t (and v_t ← 0)."""
        self.flats[0].reset_(clear_momentum)

    def add_gradients_(self, target: Tensor, gradients: Gradients, weight: float) -> None:
        """target ← target + weight Σ_t g_t; target: [S]."""
        flat = self.flats[0]
        parts = flat.parts(target[None])
        for row in range(flat.rows):
            add_present_(parts, gradients[row : len(flat.params) : flat.rows], alpha=weight)

    def end_round_(
        self,
        total: Tensor | None,
        gradients: Gradients | None,
        weight: float,
        rates: Sequence[float],
        clear_momentum: bool,
    ) -> None:
        """φ ← φ − r (total + weight Σ_t g_t); total ← 0; θ_t ← φ for every t (and v_t ← 0).

        total: [S], or None for 0; gradients: None for none; rates: r of each param group.
        """
        flat = self.flats[0]
        total = torch.zeros_like(flat.phi) if total is None else total
        if gradients is not None:
            self.add_gradients_(total, gradients, weight)
        for part, phi, segment in zip(flat.parts(total[None]), flat.initialization, flat.segments, strict=True):
            phi.sub_(part, alpha=rates[segment.group])
        total.zero_()
        self.reset_(clear_momentum)

    def squared_distances(self, rows: Tensor) -> list[float]:
        """‖θ_t − rows_t‖² for every t; rows: [T, S]."""
        return torch.linalg.vector_norm(self.flats[0].work_theta - rows, dim=1).double().square().tolist()

    def add_signs_(self, key: int, first: int, scale: float) -> None:
        """θ_t ← θ_t ± scale for every t, + where a bit of the key's random words is set.

        A bit for each number in memory order, the lowest first; each segment starts with a word of its own, the first
        one with word `first`.
        """
        flat = self.flats[0]
        shift = torch.zeros_like(flat.phi)
        counts = [sign_words(segment.numel) for segment in flat.segments]
        words = random_words(key, first, sum(counts), flat.device).split(counts)
        for segment, own in zip(flat.segments, words, strict=True):
            bits = own[:, None].bitwise_right_shift(torch.arange(64, device=flat.device)).bitwise_and_(1).view(-1)
            part = shift[segment.offset : segment.offset + segment.numel]
            part.fill_(-scale).masked_fill_(bits[: segment.numel] > 0, scale)
        flat.work_theta.add_(shift)
        if flat.master is not None:
            flat.theta.copy_(flat.master)

    def measured_step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> float:
        """The step; returns ‖φ − φ before‖²."""
        phi = self.flats[0].phi
        moved = phi.clone()
        self.step_(gradients, hyper, control)
        short = torch.linalg.vector_norm(moved.sub_(phi).view(-1, 16), dim=1)  # S is a multiple of 16
        return short.double().square().sum().item()

    def path_step_(self, point: PathPoint, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        """The point's part of the sum, and the step."""
        flat = self.flats[0]
        if point.weights:
            w = point.total.new_tensor(point.weights)
            slopes = point.total.new_tensor([-w * c for w, c in zip(point.weights, point.changes, strict=True)])
            point.total.addmv_(point.theta.sub_(flat.work_theta).T, w).addmv_(point.gradient.T, slopes)
        if point.keeps:
            point.theta.copy_(flat.work_theta)
            point.gradient.zero_()
            add_present_(flat.parts(point.gradient), gradients[: len(flat.params)], alpha=point.scale)
        self.step_(gradients, hyper, control)


def sign_words(numel: int) -> int:
    """Words of 64 signs that a tensor of so many numbers takes."""
    return -(-numel // 64)


def random_words(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Words first … first + count of a key's random 64-bit words, as int64; no state, so that every backend has the
    same.

    key: 0 ≤ key < 2^64. SplitMix64 of Steele, Lea and Flood, OOPSLA 2014, with its stream's state at word i computed
    from i.
    """
    z = torch.arange(first + 1, first + count + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)).mul_(_signed(factor))
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shifted to the right with zeros behind them."""
    return words.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)


def add_present_(targets: Sequence[Tensor], gradients: Sequence[Tensor | None], alpha: float = 1.0) -> None:
    """targets ← targets + alpha · gradients, tensor by tensor; a missing gradient adds nothing."""
    present = [(a, b) for a, b in zip(targets, gradients, strict=True) if b is not None]
    if present:
        torch._foreach_add_(*map(list, zip(*present, strict=True)), alpha=alpha)
