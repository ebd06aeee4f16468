"""Implicit MAML: the meta-gradient of a proximal inner problem, whatever path led to its solution.

Rajeswaran et al. write φ_i for the parameters of task i and θ for the meta-parameters; here, as everywhere in this
package, θ_t are the task's and φ the initialization. Their G(φ_i, θ) = L̂_i(φ_i) + λ/2 ‖φ_i − θ‖² reads L_t(θ_t) + λ/2
‖θ_t − φ‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from cts_fast.baselines.base import Method, evaluate, gradients_by
from cts_fast.engine.backends.method_ops import add_present_
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.optimizer import Step


class IMAML(Method):
    r"""φ ← φ − β mean_t (I + H_t/λ)⁻¹ ∇L_t^held(θ_t) after K inner steps on L_t(θ_t) + λ/2 ‖θ_t − φ‖², then θ_t ← φ.

    The inverse is taken by conjugate gradient with exact Hessian-vector products; weight decay is part of H_t, as it is
    of the inner problem. Should a direction of negative curvature of I + H_t/λ turn up, the solution found so far is
    taken.

    `step` needs heldout, as in `FOMAML`. At K each is called twice: the first loss gives ∇L_t^held, the second H_t (a
    training loop may return the training loss there; the next held-out batch estimates it too).

    cg_steps: iterations of conjugate gradient. lam: λ, the weight of the proximal term.

    Raises ValueError for `maximize`: give the negative loss.

    Source: Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019, Eq. (3) and Algorithms 1 and 2 (λ
    = 1, 5 iterations).
    """

    needs = frozenset({"heldout"})
    once_a_round = True
    on_host = True
    one_process = "the solutions of its linear systems are summed over the tasks of one process"
    own_options = {"cg_steps": 5, "lam": 1.0}
    _room: tuple[Flat, Tensor] | None = None

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for options that no step can use."""
        if not isinstance(own["cg_steps"], int) or own["cg_steps"] < 1:
            raise ValueError(f"Invalid cg_steps: {own['cg_steps']}; it is a number of iterations ≥ 1")
        lam = own["lam"]
        if not isinstance(lam, Real | Tensor) or not 0 < float(lam) < math.inf:
            raise ValueError(f"Invalid lam: {lam!r}; λ is a finite number > 0")

    @torch.no_grad()
    def apply_(self, step: Step) -> None:
        if any(h.maximize for h in step.hyper):
            raise ValueError("IMAML: its proximal problem is a minimization; give the negative loss and maximize=False")
        gradients = self._with_proximal_term(step.gradients, step.control.inverse_scale)
        self.update_tasks_(step._replace(gradients=gradients))
        if not step.control.reset:
            return
        flats = self.shared_flats()
        total = [torch.zeros_like(flat.phi) for flat in flats]
        targets = [part for flat, values in zip(flats, total, strict=True) for part in flat.parts(values[None])]
        with self.inner_step_counts():
            for row, loss in enumerate(step.heldout):
                add_present_(targets, self._implicit_gradient(loss, row, step.hyper), alpha=1 / self.num_tasks)
        self.engine.rebind_(self.param_groups)  # a held-out function may exchange a parameter's storage
        self.end_round_(step.hyper, step.control, total)

    def _with_proximal_term(self, gradients: Sequence[Gradients], inverse_scale: float) -> list[Gradients]:
        """g_t + λ (θ_t − φ), where the step will multiply all of it by inverse_scale; heads as they are."""
        result = []
        for collected, flats in zip(gradients, self.engine.flats, strict=True):
            flat, terms = flats[0], []
            if flat.shared:
                flat.follow_parameters_()  # θ is read before the step, which would
                rows = self._room_for(flat)
                torch.sub(flat.work_theta, flat.phi, out=rows)
                rows.mul_(self.param_groups[0]["lam"] / inverse_scale)
                terms = flat.parts(rows)
                add_present_(terms, collected[: len(terms)])
            own = [None if g is None else term for g, term in zip(collected, terms, strict=False)]
            result.append(Gradients.of(own + collected[len(terms) :]))
        return result

    def _room_for(self, flat: Flat) -> Tensor:
        """Memory for a number a coordinate of theta, the same from step to step."""
        if self._room is None or self._room[0] is not flat:
            self._room = (flat, torch.zeros_like(flat.theta))
        return self._room[1]

    def _implicit_gradient(self, heldout: Callable[[], Tensor], row: int, hyper: list[Hyper]) -> list[Tensor]:
        """(I + H/λ)⁻¹ ∇L^held of one task, one tensor a segment."""
        params, lam = self.task_params(row), self.param_groups[0]["lam"]
        decay = [hyper[segment.group].weight_decay for flat in self.shared_flats() for segment in flat.segments]
        gradient = _filled(self.task_gradients(heldout, row), params)
        loss = evaluate(heldout, row)
        with torch.enable_grad():
            slope = gradients_by(params, loss, create_graph=True)
        curved = [g for g in slope if g is not None and g.requires_grad]

        def operator(vectors: Sequence[Tensor]) -> list[Tensor]:
            """(I + H/λ) v."""
            outputs = [v for v, g in zip(vectors, slope, strict=True) if g is not None and g.requires_grad]
            products = gradients_by(params, curved, outputs, retain_graph=True) if curved else [None] * len(params)
            return [
                v + (hv + wd * v) / lam for v, hv, wd in zip(vectors, _filled(products, params), decay, strict=True)
            ]

        return conjugate_gradient(operator, gradient, self.param_groups[0]["cg_steps"])


def conjugate_gradient(
    operator: Callable[[Sequence[Tensor]], list[Tensor]], b: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """x with operator(x) ≈ b for a symmetric positive operator, from x = 0; b: the parts of one vector.

    Ends early at the solution, or where it meets a direction of curvature ≤ 0 (x so far; b itself in the first
    iteration).
    Source: Hestenes and Stiefel, 1952; Steihaug, 1983, for the early end.
    """
    x, residual, direction = [torch.zeros_like(part) for part in b], list(b), list(b)
    squared = start = _dot(residual, residual)
    for step in range(steps):
        if squared <= 1e-30 * start or squared == 0:
            break
        image = operator(direction)
        curvature = _dot(direction, image)
        if not curvature > 0:
            return x if step else list(b)
        alpha = squared / curvature
        x = [a + alpha * d for a, d in zip(x, direction, strict=True)]
        residual = [r - alpha * i for r, i in zip(residual, image, strict=True)]
        before, squared = squared, _dot(residual, residual)
        direction = [r + squared / before * d for r, d in zip(residual, direction, strict=True)]
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two vectors given in parts."""
    return math.fsum(
        torch.stack([(p.double() * q.double()).sum().to(a[0].device) for p, q in zip(a, b, strict=True)]).tolist()
    )


def _filled(gradients: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zeros where there is none."""
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, params, strict=True)]
