"""Leap: the initialization from which all tasks' gradient paths on their loss surfaces are short."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.baselines.base import Method
from cts_fast.engine.backends.base import LeapPoint
from cts_fast.engine.counters import Numbers
from cts_fast.engine.step import Control, Hyper


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
    buffers = {"meta_gradient": False, "previous_theta": True, "previous_gradient": True}

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for an unknown measure."""
        if own["measure"] not in ("length", "energy"):
            raise ValueError(f'Invalid measure: {own["measure"]!r}; known: "length", "energy"')

    def _build(self) -> None:
        params = next(
            segment.params for segment in self._segments() if segment.task is None
        )  # one a task: they keep its last loss
        kept = [self.state[param]["previous_loss"] for param in params if "previous_loss" in self.state.get(param, {})]
        super()._build()
        previous = torch.zeros(len(params), dtype=torch.float64, device="cpu")
        for i, param in enumerate(params):
            if kept:
                previous[i] = kept[i]
            self.state[param]["previous_loss"] = previous[i]
        self._previous_loss = Numbers(previous)

    @torch.no_grad()
    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        loss = _on_host(losses)
        changes = [now - before for now, before in zip(loss, self._previous_loss.read(), strict=True)]
        self._previous_loss.write(loss)
        weights, changes = (self._weights(changes), changes) if self.inner_step else ([], [])
        points = iter([self._point(own, weights, changes, control) for own in self._own])
        launchers = self._launchers_of(lambda launcher, *step: launcher.leap_step_(next(points), *step))
        self._inner_step_(gradients, hyper, control, nonfinite, launchers)
        if control.reset:
            self._end_round_(hyper, control, [own["meta_gradient"] for own in self._own])
            self._clear_()

    @staticmethod
    def _point(own: dict[str, Tensor], weights: list[float], changes: list[float], control: Control) -> LeapPoint:
        buffers = (own["meta_gradient"], own["previous_theta"], own["previous_gradient"])
        return LeapPoint(*buffers, weights, changes, scale=control.inverse_scale, keeps=not control.reset)

    def _weights(self, loss_changes: list[float]) -> list[float]:
        """p ‖γ_{k+1} − γ_k‖^(p−2) / T of each task's segment from the kept point to this one."""
        p = 1 if self.param_groups[0]["measure"] == "length" else 2
        parts = [
            passes.squared_distances(own["previous_theta"])
            for passes, own in zip(self._passes(), self._own, strict=True)
        ]
        squared = [change * change + sum(moved) for change, *moved in zip(loss_changes, *parts, strict=True)]
        # a path that stands still has no direction
        return [p * s ** (p / 2 - 1) / len(squared) if s > 0 else 0.0 for s in squared]


def _on_host(losses: Sequence) -> list[float]:
    """The losses as numbers; waits once for another device."""
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in losses):
        return torch.stack([torch.as_tensor(x).reshape(()) for x in losses]).tolist()
    return [float(x) for x in losses]
