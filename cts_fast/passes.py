"""What methods do beside the step, over the shared buffers of one device and dtype; a backend's launcher may have faster ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.flat import Flat
from cts_fast.gradients import Gradients


class Passes:
    """Torch ops on `flats[0]`, the shared parameters: T rows of S columns.

    Buffers of a method are in phi's dtype: [S] laid out as phi, [T, S] laid out as theta. Gradients come as a `Collector` collects them:
    dense, segment by segment and row by row, None where there is none.
    """

    flats: Sequence[Flat]

    def add_gradients_(self, target: Tensor, gradients: Gradients, weights: Sequence[float]) -> None:
        """target ← target + w Σ_t g_t; target: [S]; weights: w of each param group."""
        flat = self.flats[0]
        parts = flat.parts(target[None])
        for row in range(flat.rows):
            for group, weight in enumerate(weights):
                pairs = [
                    (part, g)
                    for part, g, segment in zip(parts, gradients[row : len(flat.params) : flat.rows], flat.segments, strict=True)
                    if g is not None and segment.group == group
                ]
                if pairs:
                    torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=weight)

    def reset_(self, clear_momentum: bool) -> None:
        """θ_t ← φ for every t (and v_t ← 0)."""
        self.flats[0].reset_(clear_momentum)

    def squared_distances(self, rows: Tensor) -> list[float]:
        """‖θ_t − rows_t‖² for every t; rows: [T, S]."""
        return torch.linalg.vector_norm(self.flats[0].work_theta - rows, dim=1).double().square().tolist()

    def squared_move(self, before: Tensor) -> float:
        """‖φ − before‖²; before: [S], whose values may be lost."""
        short = torch.linalg.vector_norm(before.sub_(self.flats[0].phi).view(-1, 16), dim=1)  # S is a multiple of 16
        return short.double().square().sum().item()

    def add_signs_(self, signs: Tensor, scale: float) -> None:
        """θ_t ← θ_t + scale · signs for every t; signs: int8 [P], the shared parameters one after the other in memory order."""
        flat = self.flats[0]
        shift = torch.zeros_like(flat.phi)
        sizes = [segment.numel for segment in flat.segments]
        places = [shift[segment.offset : segment.offset + segment.numel] for segment in flat.segments]
        torch._foreach_copy_(places, signs.split(sizes))
        flat.work_theta.add_(shift, alpha=scale)
        if flat.master is not None:
            flat.theta.copy_(flat.master)

    def leap_(
        self, total: Tensor, theta: Tensor, gradient: Tensor, gradients: Gradients, weights: Sequence[float],
        changes: Sequence[float], scale: float, keeps: bool,
    ) -> None:  # fmt: skip
        """total ← total + Σ_t w_t ((θ_t^kept − θ_t) − c_t g_t^kept); then, if `keeps`, θ^kept ← θ and g^kept ← scale · gradients.

        total: [S]; theta, gradient: [T, S], what is kept; weights, changes: the T of each, or none of both: no segment ends here.
        """
        flat = self.flats[0]
        if weights:
            w, slopes = total.new_tensor(weights), total.new_tensor([-w * c for w, c in zip(weights, changes, strict=True)])
            total.addmv_(theta.sub_(flat.work_theta).T, w).addmv_(gradient.T, slopes)
        if keeps:
            theta.copy_(flat.work_theta)
            gradient.zero_()
            pairs = [(part, g) for part, g in zip(flat.parts(gradient), gradients[: len(flat.params)], strict=True) if g is not None]
            if pairs:
                torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=scale)
