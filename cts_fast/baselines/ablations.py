"""The shifting paper's own variants of its rule: no shift, a random shift, and trajectories computed anew."""

from __future__ import annotations

import math
from hashlib import blake2b
from itertools import accumulate

import torch

from cts_fast.baselines.base import Method
from cts_fast.engine.backends.method_ops import sign_words
from cts_fast.engine.plan import Control, Counters, check_options
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.step import shifting_step_
from cts_fast.optimizer import Step


class NoShifting(Method):
    r"""Δ = β (mean_t θ_t − φ) moves φ after every inner step and leaves every θ_t where it is; θ_t ← φ after K steps.

    Raises ValueError if a `shift` is given, to a group or by a loaded state dict too.

    Source: Shin et al., ICML 2021, section 4.2 (ablation).
    """

    def __init__(self, tasks, lr=1e-3, **options) -> None:
        options.setdefault("shift", 0.0)
        super().__init__(tasks, lr, **options)

    def complete(self, options: dict) -> None:
        self._check_shift(options["shift"])
        super().complete(options)

    def read_hyper(self) -> list[Hyper]:
        hyper = super().read_hyper()
        for g, h in enumerate(hyper):
            self._check_shift(h.shift, f", in group {g}")
        return hyper

    def _check_shift(self, shift: float, where: str = "") -> None:
        if shift != 0:
            raise ValueError(f"{type(self).__name__}: the shift is 0 by definition, but shift={shift} was given{where}")


class RandomShifting(NoShifting):
    r"""θ_t ← θ_t + r for every t, with one random direction r for all tasks and ‖r‖ = ‖Δ‖ over all shared coordinates.

    Each coordinate of r is ± ‖Δ‖ / √P, either sign with the same chance; at a reset none is drawn, as φ replaces what
    it would have moved.

    seed: of the directions. Direction i depends on seed, i, and the shapes and order of the parameters (those of one
    device and precision after those of another), so a resumed run draws the same ones.

    Source: Shin et al., ICML 2021, section 4.2 (ablation).
    """

    own_options = {"seed": 0}
    on_host = True
    one_process = "the length of its shifts is measured in one process"

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for a seed that is no whole number."""
        if not isinstance(own["seed"], int) or isinstance(own["seed"], bool) or own["seed"] < 0:
            raise ValueError(f"Invalid seed: {own['seed']}; it is a whole number ≥ 0")

    def apply_(self, step: Step) -> None:
        draws = step.control.meta_update and not step.control.reset
        self._shift_at_random_(step) if draws else super().apply_(step)

    @torch.no_grad()
    def _shift_at_random_(self, step: Step) -> None:
        name = f"{self.param_groups[0]['seed']} {self.meta_updates}"
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
        moved: list[float] = []

        def measured_step_(backend, *arguments) -> None:
            moved.append(backend.measured_step_(*arguments))

        shifting_step_(self.engine, step.gradients, step.hyper, step.control, measured_step_)
        segments = [flat.segments for flat in self.shared_flats()]
        numbers = sum(segment.numel for own in segments for segment in own)
        words = [sum(sign_words(segment.numel) for segment in own) for own in segments]
        scale = math.sqrt(sum(moved) / (numbers or 1))
        # random words go on from one buffer to the next
        for (backend, _), first in zip(self.engine.shared, accumulate(words, initial=0), strict=False):
            backend.add_signs_(key, first, scale)  # this step's writes are noted for autograd already


class ShiftingAccurate(Method):
    r"""Every Δ_k from a run of its own: for k = 1 … K: θ_t ← φ; k inner steps; φ ← φ + β (mean_t θ_t − φ).

    What shifting approximates, at the cost of K (K + 1) / 2 inner steps a round. Each call of `step` is one inner step,
    whichever run it belongs to, so any training loop drives it; `inner_step` counts 1 … K (K + 1) / 2 and
    `meta_updates` K in a round. Each ends a run, so `shift` has no effect and a `meta_interval` raises ValueError.

    Source: Shin et al., ICML 2021, section 3.2 and Figure 4 ("Ours Accurate").
    """

    on_host = True
    one_process = "it is the paper's measure of what shifting approximates, for small problems"

    def complete(self, options: dict) -> None:
        super().complete(options)
        if options["meta_interval"] != 1:
            interval = options["meta_interval"]
            raise ValueError(
                f"ShiftingAccurate: its meta-updates come at the ends of its runs, not every {interval} steps"
            )

    def plan(self, counters: Counters) -> tuple[Control, Counters]:
        options = self.param_groups[0]
        check_options(options)
        inner_step = counters.inner_step + 1
        k = math.isqrt(2 * inner_step)  # run k ends at inner step 1 + 2 + … + k
        ends = 2 * inner_step == k * (k + 1)
        last = ends and options["horizon"] is not None and k >= options["horizon"]
        after = Counters(0 if last else inner_step, counters.round + last, counters.meta_updates + ends)
        return Control(ends, ends, options["reset_momentum"], self.num_tasks), after
