"""The shifting paper's own variants of its rule: no shift, a random shift, and trajectories computed anew."""

from __future__ import annotations

import math
import random

import torch

from cts_fast.baselines.base import Method, views_of, work_theta
from cts_fast.ops import Control, Hyper


class NoShifting(Method):
    r"""Δ = β (mean_t θ_t − φ) moves φ after every inner step and leaves every θ_t where it is; θ_t ← φ after K steps.

    Raises ValueError if `shift` is given.

    Source: Shin et al., ICML 2021, section 4.2 (ablation).
    """

    def __init__(self, tasks, lr=1e-3, **options) -> None:
        if options.setdefault("shift", 0.0) != 0:
            raise ValueError(f"NoShifting: the shift is 0 by definition, but shift={options['shift']} was given")
        super().__init__(tasks, lr, **options)


class RandomShifting(NoShifting):
    r"""θ_t ← θ_t + r for every t, with one random direction r for all tasks and ‖r‖ = ‖Δ‖ over all shared coordinates.

    seed: of the directions. Direction i depends on seed and i alone, so a resumed run draws the same ones.

    Source: Shin et al., ICML 2021, section 4.2 (ablation).
    """

    own_options = {"seed": 0}
    on_host = True

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for a seed that is no whole number."""
        if not isinstance(own["seed"], int) or isinstance(own["seed"], bool) or own["seed"] < 0:
            raise ValueError(f"Invalid seed: {own['seed']}; it is a whole number ≥ 0")

    @torch.no_grad()
    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        shared = self._shared()
        before = [flat.phi.clone() for flat in shared]
        super()._apply_(gradients, hyper, control._replace(reset=False), nonfinite, losses, heldout)
        if control.meta_update:
            self._draw_()
            moved = _norm([flat.phi - old for flat, old in zip(shared, before, strict=True)])
            scale = moved / (_norm(self._directions) or 1.0)
            for flat, direction in zip(shared, self._directions, strict=True):
                work_theta(flat).add_(direction, alpha=scale)
                if flat.master is not None:
                    flat.theta.copy_(flat.master)
        for flat in shared:
            if control.reset:
                flat.reset_(control.reset_momentum)
            torch.autograd.graph.increment_version(flat.written)

    def _build(self) -> None:
        super()._build()
        self._directions = [torch.zeros_like(flat.phi) for flat in self._shared()]
        self._direction_views = [
            views_of(flat, values[None]) for flat, values in zip(self._shared(), self._directions, strict=True)
        ]

    def _draw_(self) -> None:
        """Normal noise into the directions, the same whatever the precision and the layout; their padding stays 0."""
        for i, (flat, views) in enumerate(zip(self._shared(), self._direction_views, strict=True)):
            # CPU generators hear 32 bits of a seed: all of it is mixed into those
            key = f"{self.param_groups[0]['seed']} {self.meta_updates} {i}"
            generator = torch.Generator(flat.device).manual_seed(random.Random(key).getrandbits(32))
            noise = torch.randn(sum(view.numel() for view in views), device=flat.device, generator=generator)
            parts = noise.split([view.numel() for view in views])
            torch._foreach_copy_(views, [part.view(view.shape) for part, view in zip(parts, views, strict=True)])


class ShiftingAccurate(Method):
    r"""Every Δ_k from a run of its own: for k = 1 … K: θ_t ← φ; k inner steps; φ ← φ + β (mean_t θ_t − φ).

    What shifting approximates, at the cost of K (K + 1) / 2 inner steps a round. Each call of `step` is one inner step,
    whichever run it belongs to, so any training loop drives it; `inner_step` counts 1 … K (K + 1) / 2 and
    `meta_updates` K in a round.

    Source: Shin et al., ICML 2021, section 3.2 and Figure 4 ("Ours Accurate").
    """

    on_host = True

    def _plan(self, inner_step: int, round_: int, meta_updates: int) -> tuple[Control, tuple[int, int, int]]:
        options = self.param_groups[0]
        inner_step += 1
        k = math.isqrt(2 * inner_step)  # run k ends at inner step 1 + 2 + … + k
        ends = 2 * inner_step == k * (k + 1)
        last = ends and options["horizon"] is not None and k >= options["horizon"]
        return Control(ends, ends, options["reset_momentum"]), (
            0 if last else inner_step,
            round_ + last,
            meta_updates + ends,
        )


def _norm(vectors: list[torch.Tensor]) -> float:
    """The Euclidean norm of all vectors together."""
    return math.hypot(*(torch.linalg.vector_norm(vector, dtype=torch.float64).item() for vector in vectors))
