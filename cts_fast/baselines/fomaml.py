"""First-order MAML, with the held-out loss at the end of the trajectory, and along all of it (MAML++)."""

from __future__ import annotations

import torch

from cts_fast.baselines.base import Method
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.optimizer import Step


class FOMAML(Method):
    r"""φ ← φ − β mean_t ∇L_t^held(θ_t) after K inner steps, then θ_t ← φ: MAML's meta-gradient with dθ_K/dφ taken as I.

    `step` needs heldout: T functions that return the loss, with its graph, of held-out data at the current θ_t. They
    are called at K, after the inner step, and their gradients are held together. Should one raise, that inner step
    counts, φ stays, and the next step ends the round. `nonfinite` looks at the training gradients alone. With
    `maximize` the held-out value is maximized too.

    Source: Finn et al., "Model-Agnostic Meta-Learning", ICML 2017, section 5.2; Nichol et al., 2018.
    """

    needs = frozenset({"heldout"})
    once_a_round = True
    on_host = True
    one_process = "the gradients of its held-out losses are summed over the tasks of one process"

    def apply_(self, step: Step) -> None:
        self.update_tasks_(step)
        if step.control.reset:
            with self.inner_step_counts():
                found = self.heldout_gradients(step.heldout)
            with torch.no_grad():
                self.end_round_(descending(step.hyper), step.control, [None] * len(found), found, 1 / self.num_tasks)


class FOMAMLPlusPlus(Method):
    r"""φ ← φ − β (1/K) Σ_{k=1…K} mean_t ∇L_t^held(θ_t,k), then θ_t ← φ.

    FOMAML with the multi-step loss of MAML++, all weights equal.

    `step` needs heldout, as in `FOMAML`; they are called after every inner step.

    Source: Antoniou et al., "How to Train Your MAML", ICLR 2019, section 4 (multi-step loss optimization).
    """

    needs = frozenset({"heldout"})
    once_a_round = True
    on_host = True
    one_process = "its held-out gradients along the way are summed over the tasks of one process"
    buffers = {"meta_gradient": "shared"}

    @torch.no_grad()
    def apply_(self, step: Step) -> None:
        self.update_tasks_(step)
        with self.inner_step_counts():
            found = self.heldout_gradients(step.heldout)
        weight = 1 / (self.param_groups[0]["horizon"] * self.num_tasks)
        totals = [flat.own["meta_gradient"] for flat in self.shared_flats()]
        if step.control.reset:
            self.end_round_(descending(step.hyper), step.control, totals, found, weight)
            return
        for (backend, _), total, gradients in zip(self.engine.shared, totals, found, strict=True):
            backend.add_gradients_(total, gradients, weight)


def descending(hyper: list[Hyper]) -> list[Hyper]:
    """Hyper-parameters whose meta_lr descends, or with `maximize` ascends, along the held-out gradient."""
    return [h._replace(meta_lr=-h.meta_lr) if h.maximize else h for h in hyper]
