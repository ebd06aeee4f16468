"""The shifting paper's own variants of its rule: no shift, a random shift, and trajectories computed anew."""

from __future__ import annotations

import math
import random

import torch

from cts_fast.baselines.base import Method
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

    Each coordinate of the direction is drawn from 128 evenly spaced values around 0; at a reset none is drawn, as φ
    replaces what it would have moved.

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
        moves = control.meta_update and not control.reset
        if moves:
            for flat, old in zip(shared, self._before, strict=True):
                old.copy_(flat.phi)
        super()._apply_(gradients, hyper, control, nonfinite, losses, heldout)
        if not moves:
            return
        self._draw_()
        moved = _norm([old.sub_(flat.phi) for flat, old in zip(shared, self._before, strict=True)])
        scale = moved / (_norm(self._directions) or 1.0)
        for flat, direction in zip(shared, self._directions, strict=True):
            flat.work_theta.add_(direction, alpha=scale)
            if flat.master is not None:
                flat.theta.copy_(flat.master)
            torch.autograd.graph.increment_version(flat.written)

    def _build(self) -> None:
        super()._build()
        shared = self._shared()
        self._before = [torch.zeros_like(flat.phi) for flat in shared]
        self._directions = [torch.zeros_like(flat.phi) for flat in shared]
        # a random byte for each number, in the order of the parameters: normal ones would take longer than the step
        sizes = [[segment.numel for segment in flat.segments] for flat in shared]
        self._words = [torch.zeros(-(-sum(n) // 8), dtype=torch.int64, device=f.device) for f, n in zip(shared, sizes, strict=True)]
        self._noise = [w.view(torch.int8)[: sum(n)].split(n) for w, n in zip(self._words, sizes, strict=True)]
        self._places = [
            [direction[segment.offset : segment.offset + segment.numel] for segment in flat.segments]
            for flat, direction in zip(shared, self._directions, strict=True)
        ]

    def _draw_(self) -> None:
        """Noise into the directions, the same whatever the precision and the padding, which stays 0."""
        for i, (words, noise, places) in enumerate(zip(self._words, self._noise, self._places, strict=True)):
            # CPU generators hear 32 bits of a seed: all of it is mixed into those
            key = f"{self.param_groups[0]['seed']} {self.meta_updates} {i}"
            generator = torch.Generator(words.device).manual_seed(random.Random(key).getrandbits(32))
            words.random_(-(2**63), None, generator=generator).bitwise_or_(0x0101010101010101)  # odd bytes: -127 … 127
            torch._foreach_copy_(places, noise)


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
    """The Euclidean norm of all vectors together: short sums as they are, their sum in float64. Lengths: multiples of 16."""
    short = [torch.linalg.vector_norm(vector.view(-1, 16), dim=1) for vector in vectors]
    return math.hypot(*(torch.linalg.vector_norm(norms, dtype=torch.float64).item() for norms in short))
