"""Leap: the initialization from which all tasks' gradient paths on their loss surfaces are short."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.baselines.base import Method
from cts_fast.engine.backends.method_ops import PathPoint
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control
from cts_fast.optimizer import Step


class Leap(Method):
    r"""φ ← φ − β mean_t ∇F_t after K inner steps, then θ_t ← φ, where F_t is the length or energy of task t's path.

    .. code-block:: text

        F  = Σ_k ‖γ_{k+1} − γ_k‖^p,  γ_k = (θ_k, L(θ_k)),  p = 1 (length) or 2 (energy)
        ∇F = −p Σ_k ‖γ_{k+1} − γ_k‖^(p−2) (θ_{k+1} − θ_k + (L(θ_{k+1}) − L(θ_k)) ∇L(θ_k))

    In ∇F the end γ_{k+1} of a segment is held fixed and dθ_k/dφ is taken as I.
    `step` needs losses: the T losses whose gradients it is given, so that loss, gradient and parameters are of one
    point. K calls see the K points θ_0 … θ_{K−1}, hence K − 1 segments: the loss at θ_K would cost a further forward
    pass.

    measure: "length" (the default) or "energy".

    Source: Flennerhag et al., "Transferring Knowledge across Learning Processes", ICLR 2019, Algorithm 1 and Eq. (8).
    """

    needs = frozenset({"losses"})
    once_a_round = True
    on_host = True
    own_options = {"measure": "length"}
    buffers = {
        "meta_gradient": "shared",
        "previous_theta": "point",
        "previous_gradient": "task",
        "previous_loss": "number",
    }

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for an unknown measure."""
        if own["measure"] not in ("length", "energy"):
            raise ValueError(f'Invalid measure: {own["measure"]!r}; known: "length", "energy"')

    @torch.no_grad()
    def apply_(self, step: Step) -> None:
        for flat in self.shared_flats():
            flat.follow_parameters_()  # the point is read before the step, which would
        loss, previous = _on_host(step.losses), self.engine.numbers["previous_loss"]
        changes = [now - before for now, before in zip(loss, previous.read(), strict=True)]
        previous.write(loss)
        weights, changes = (self._weights(changes), changes) if self.inner_step else ([], [])

        def leave_point_(backend, *arguments) -> None:
            backend.path_step_(_point(backend.flats[0], weights, changes, step.control), *arguments)

        self.update_tasks_(step, leave_point_)
        if step.control.reset:
            total = self.over_ranks([flat.own["meta_gradient"] for flat in self.shared_flats()])
            self.end_round_(step.hyper, step.control, total)
            self.clear_buffers_()

    def _weights(self, loss_changes: list[float]) -> list[float]:
        """p ‖γ_{k+1} − γ_k‖^(p−2) / T of each task's segment from the kept point to this one."""
        p = 1 if self.param_groups[0]["measure"] == "length" else 2
        parts = [backend.squared_distances(flat.own["previous_theta"]) for backend, flat in self.engine.shared]
        squared = [change * change + sum(moved) for change, *moved in zip(loss_changes, *parts, strict=True)]
        # a path that stands still has no direction
        return [p * s ** (p / 2 - 1) / self.num_tasks if s > 0 else 0.0 for s in squared]


def _point(flat: Flat, weights: list[float], changes: list[float], control: Control) -> PathPoint:
    buffers = (flat.own["meta_gradient"], flat.own["previous_theta"], flat.own["previous_gradient"])
    return PathPoint(*buffers, weights, changes, scale=control.inverse_scale, keeps=not control.reset)


def _on_host(losses: Sequence) -> list[float]:
    """The losses as numbers; waits once for another device."""
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in losses):
        return torch.stack([torch.as_tensor(x).reshape(()) for x in losses]).tolist()
    return [float(x) for x in losses]
