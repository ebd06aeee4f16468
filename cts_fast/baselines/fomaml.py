"""First-order MAML, with the held-out loss at the end of the trajectory, and along all of it (MAML++)."""

from __future__ import annotations

import torch

from cts_fast.baselines.base import Method
from cts_fast.engine.step import Control, Hyper


class FOMAML(Method):
    r"""φ ← φ − β mean_t ∇L_t^held(θ_t) after K inner steps, then θ_t ← φ: MAML's meta-gradient with dθ_K/dφ taken as I.

    `step` needs heldout: T functions that return the loss, with its graph, of held-out data at the current θ_t. They
    are called at K, and their gradients are held together. With `maximize` the held-out value is maximized too.

    Source: Finn et al., "Model-Agnostic Meta-Learning", ICML 2017, section 5.2; Nichol et al., 2018.
    """

    needs = frozenset({"heldout"})
    once_a_round = True
    on_host = True

    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        self._inner_step_(gradients, hyper, control, nonfinite)
        if control.reset:
            found = self._heldout_gradients(heldout)
            with torch.no_grad():
                self._end_round_(descending(hyper), control, [None] * len(found), found, 1 / self.num_tasks)


class FOMAMLPlusPlus(Method):
    r"""φ ← φ − β (1/K) Σ_{k=1…K} mean_t ∇L_t^held(θ_t,k), then θ_t ← φ.

    FOMAML with the multi-step loss of MAML++, all weights equal.

    `step` needs heldout, as in `FOMAML`; they are called after every inner step.

    Source: Antoniou et al., "How to Train Your MAML", ICLR 2019, section 4 (multi-step loss optimization).
    """

    needs = frozenset({"heldout"})
    once_a_round = True
    on_host = True
    buffers = {"meta_gradient": False}

    @torch.no_grad()
    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        self._inner_step_(gradients, hyper, control, nonfinite)
        weight = 1 / (self.param_groups[0]["horizon"] * self.num_tasks)
        totals, found = [own["meta_gradient"] for own in self._own], self._heldout_gradients(heldout)
        if control.reset:
            self._end_round_(descending(hyper), control, totals, found, weight)
            return
        for passes, total, gradients in zip(self._passes(), totals, found, strict=True):
            passes.add_gradients_(total, gradients, weight)


def descending(hyper: list[Hyper]) -> list[Hyper]:
    """Hyper-parameters whose meta_lr descends, or with `maximize` ascends, along the held-out gradient."""
    return [h._replace(meta_lr=-h.meta_lr) if h.maximize else h for h in hyper]
