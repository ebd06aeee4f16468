"""Continual trajectory shifting in plain PyTorch, in the paper's notation: the oracle of every other backend.

Shin et al., "Large-Scale Meta-Learning with Continual Trajectory Shifting", ICML 2021, Algorithm 2; the inner step is
torch.optim.SGD's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper, inner_update_


def sum_of_differences(phi: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """Σ_t (theta_t − phi): minus T times the Reptile gradient, summed over the tasks in their order; [n]."""
    return sum((theta_t - phi for theta_t in theta[1:]), start=theta[0] - phi)


def meta_update_(phi: Tensor, theta: Sequence[Tensor], total: Tensor, h: Hyper, num_tasks: int) -> None:
    """Δ = β/T total;  phi ← phi + Δ;  theta_t ← theta_t + shift · Δ; total: [n], over all T tasks."""
    delta = total * (h.meta_lr / num_tasks) if h.meta_lr else torch.zeros_like(phi)
    phi.add_(delta)
    for theta_t in theta:
        theta_t.add_(delta, alpha=h.shift)


def inner_updates_(
    theta: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor | None], started: Sequence[bool], h: Hyper
) -> None:
    """The inner step of every task with a gradient, of one tensor: T tensors of [n] each."""
    for t, gradient in enumerate(g):
        if gradient is not None:
            inner_update_(theta[t], v[t], gradient, started[t], h)


def reference_step_(
    phi: Tensor | None,
    theta: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor | None],
    started: Sequence[bool],
    h: Hyper,
    c: Control,
) -> None:
    """One step of Algorithm 2 for one tensor of all tasks, in place.

    phi: [n], or None for a head. theta, v, g: T tensors of [n]; a missing gradient leaves that task's inner step out.
    """
    inner_updates_(theta, v, g, started, h)
    if phi is None:
        return
    if c.meta_update:
        meta_update_(phi, theta, sum_of_differences(phi, theta), h, c.num_tasks)
    if c.reset:
        for theta_t, v_t in zip(theta, v, strict=True):
            theta_t.copy_(phi)
            if c.reset_momentum:
                v_t.zero_()


class Reference(Backend):
    """Runs the equations segment by segment over the flat buffers; low precision computes in float32 and rounds what it
    stores.
    """

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        def whole_(phi: Tensor | None, theta, v, g, started, h: Hyper, _columns: slice) -> None:
            reference_step_(phi, theta, v, g, started, h, control)

        self._step_segments_(gradients, hyper, control, whole_)

    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        def first_half_(phi: Tensor | None, theta, v, g, started, h: Hyper, columns: slice) -> None:
            inner_updates_(theta, v, g, started, h)
            if phi is not None:
                total[columns] = sum_of_differences(phi, theta)
                for v_t in v if control.reset and control.reset_momentum else ():
                    v_t.zero_()

        self._step_segments_(gradients, hyper, control, first_half_)

    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        flat = self.flats[0]
        for segment in flat.segments:
            columns = slice(segment.offset, segment.offset + segment.numel)
            phi, theta = flat.phi[columns], [row[columns] for row in flat.work_theta]
            meta_update_(phi, theta, total[columns], hyper[segment.group], control.num_tasks)
            for theta_t in theta if control.reset else ():
                theta_t.copy_(phi)
        if flat.master is not None:
            flat.theta.copy_(flat.master)

    def _step_segments_(
        self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, step_: Callable[..., None]
    ) -> None:
        """step_(phi, theta, v, g, started, h, columns) of every tensor of all rows, in working precision."""
        i = 0
        for flat in self.flats:
            work = flat.work_theta
            flat.follow_parameters_()
            for n, segment in enumerate(flat.segments):
                columns = slice(segment.offset, segment.offset + segment.numel)
                g = [
                    None if x is None else in_memory_order(x, flat.work_dtype) * control.inverse_scale
                    for x in gradients[i : i + flat.rows]
                ]
                control.flag_nonfinite(i, g)
                v = [row[columns].to(flat.work_dtype) for row in flat.momentum]
                phi = None if flat.phi is None else flat.phi[columns]
                theta, started = [row[columns] for row in work], flat.started[n].tolist()
                step_(phi, theta, v, g, started, hyper[segment.group], columns)
                for row, v_t in zip(flat.momentum, v, strict=True):
                    row[columns].copy_(v_t)
                i += flat.rows
            if flat.master is not None:
                flat.theta.copy_(work)


def in_memory_order(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense gradient in memory order, [numel]."""
    return gradient.detach().as_strided((gradient.numel(),), (1,), gradient.storage_offset()).to(dtype)
