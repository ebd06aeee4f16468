"""Leap: the initialization from which all tasks' gradient paths on their loss surfaces are short."""

from __future__ import annotations

import torch
from torch import Tensor

from cts_fast.baselines.base import Method, copy_present_, work_theta
from cts_fast.ops import Control, Hyper


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
        self._previous_loss = torch.zeros(len(params), dtype=torch.float64, device=params[0].device)
        for i, param in enumerate(params):
            if kept:
                self._previous_loss[i] = kept[i]
            self.state[param]["previous_loss"] = self._previous_loss[i]

    @torch.no_grad()
    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        loss = torch.stack(
            [
                torch.as_tensor(x, dtype=torch.float64, device=self._previous_loss.device).detach().reshape(())
                for x in losses
            ]
        )
        if self.inner_step:
            self._add_segment_(loss - self._previous_loss)
        if not control.reset:
            self._keep_point_(loss, gradients, control.inverse_scale)
        self._inner_step_(gradients, hyper, control, nonfinite)
        self._finish_(hyper, control, [own["meta_gradient"] for own in self._own])

    def _keep_point_(self, loss: Tensor, gradients, inverse_scale: float) -> None:
        """The loss [T], θ and ∇L of this point of the paths, for the segment that ends at the next."""
        self._previous_loss.copy_(loss)
        for flat, own, views, found in zip(
            self._shared(), self._own, self._views, self._shared_gradients(gradients), strict=True
        ):
            own["previous_theta"].copy_(work_theta(flat))
            copy_present_(views["previous_gradient"], found)
            if inverse_scale != 1:
                own["previous_gradient"].mul_(inverse_scale)

    def _add_segment_(self, loss_change: Tensor) -> None:
        """Add the segment from the kept point to this one; loss_change: L(θ_{k+1}) − L(θ_k), [T]."""
        p = 1 if self.param_groups[0]["measure"] == "length" else 2
        squared = loss_change.square()
        for flat, own in zip(self._shared(), self._own, strict=True):
            moved_back = own["previous_theta"].sub_(work_theta(flat))
            squared = squared + torch.linalg.vector_norm(moved_back, dim=1).to(squared).square()
        weight = torch.where(squared > 0, p * squared ** (p / 2 - 1), 0) / len(
            squared
        )  # a path that stands still has no direction
        for own in self._own:
            total = own["meta_gradient"]
            total.addmv_(own["previous_theta"].T, weight.to(total))
            total.addmv_(own["previous_gradient"].T, (weight * loss_change).to(total), alpha=-1)
