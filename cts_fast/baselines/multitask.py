"""Multi-task learning: one body, trained on the mean loss of all tasks."""

import torch

from cts_fast.baselines.base import Method
from cts_fast.engine.plan import Control, Counters, check_options
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.optimizer import Step


class MultiTask(Method):
    r"""φ ← φ − α u with the gradient of mean_t L_t(φ), and θ_t = φ at all times: plain SGD on one body.

    The inner step is linear in gradient and momentum, so T steps from the same θ followed by θ_t, φ ← mean_t θ_t are
    that step: the fused op with β = 1 and a reset that keeps the momentum. There is no meta-update to set: `meta_lr`,
    `shift`, `meta_interval` and `reset_momentum` have no effect, and `horizon` only counts rounds. Where φ is written
    between two steps, θ follows at the next one.

    Source: Caruana, "Multitask Learning", 1997; Shin et al., ICML 2021, section 4 (MTL).
    """

    on_host = True

    def plan(self, counters: Counters) -> tuple[Control, Counters]:
        check_options(self.param_groups[0])
        horizon, inner_step = self.param_groups[0]["horizon"], counters.inner_step + 1
        ends = horizon is not None and inner_step >= horizon
        after = Counters(0 if ends else inner_step, counters.round + ends, counters.meta_updates + 1)
        return Control(True, True, False, self.num_tasks), after

    @torch.no_grad()
    def apply_(self, step: Step) -> None:
        written = self.engine.phi_writes.counted()
        for flat in self.shared_flats() if written else ():
            flat.follow_phi_(written)
        super().apply_(step)
        self.engine.phi_writes.note_counts()

    def read_hyper(self) -> list[Hyper]:
        return [hyper._replace(meta_lr=1.0) for hyper in super().read_hyper()]
