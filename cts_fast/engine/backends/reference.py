"""Continual trajectory shifting in plain PyTorch, in the paper's notation: the oracle of every other backend.

Shin et al., "Large-Scale Meta-Learning with Continual Trajectory Shifting", ICML 2021, Algorithm 2; the inner step is
torch.optim.SGD's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper, inner_step_


def meta_update(phi: Tensor, theta: Sequence[Tensor], h: Hyper, num_tasks: int) -> Tensor:
    """Δ = β (mean_t theta_t − phi): minus β times the Reptile gradient, averaged over the tasks in their order; [n]."""
    delta = sum((theta_t - phi for theta_t in theta[1:]), start=theta[0] - phi)
    return delta * (h.meta_lr / num_tasks) if h.meta_lr else torch.zeros_like(phi)


def shifting_step_(
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
    for t, gradient in enumerate(g):
        if gradient is not None:
            inner_step_(theta[t], v[t], gradient, started[t], h)
    if phi is None:
        return
    if c.meta_update:
        delta = meta_update(phi, theta, h, c.num_tasks)
        phi.add_(delta)
        for theta_t in theta:
            theta_t.add_(delta, alpha=h.shift)
    if c.reset:
        for theta_t, v_t in zip(theta, v, strict=True):
            theta_t.copy_(phi)
            if c.reset_momentum:
                v_t.zero_()


class Reference(Backend):
    """Runs the equations segment by segment over the flat buffers; low precision computes in float32 and rounds what it
    stores.
    """

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
        """Why it cannot run there; None if it can."""
        if capturable and device.type != "cpu":
            return "it takes its decisions on the host, which a captured step may not"
        return None

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        i = 0
        for flat in self.flats:
            work = flat.theta if flat.master is None else flat.master
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
                shifting_step_(phi, theta, v, g, started, hyper[segment.group], control)
                for row, v_t in zip(flat.momentum, v, strict=True):
                    row[columns].copy_(v_t)
                i += flat.rows
            if flat.master is not None:
                flat.theta.copy_(work)


def in_memory_order(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense gradient in memory order, [numel]."""
    return gradient.detach().as_strided((gradient.numel(),), (1,), gradient.storage_offset()).to(dtype)
