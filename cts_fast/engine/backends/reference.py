"""Continual trajectory shifting in plain PyTorch, in the paper's notation: the oracle of every other backend.

Shin et al., "Large-Scale Meta-Learning with Continual Trajectory Shifting", ICML 2021, Algorithm 2; the inner step is torch.optim.SGD's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Passes
from cts_fast.engine.layout import Flat
from cts_fast.engine.step import Control, Hyper


def inner_step_(theta: Tensor, v: Tensor, g: Tensor, started: bool, h: Hyper) -> None:
    """One SGD-momentum step of one tensor of one task, theta and v in place (METHOD: d, v, u, theta); all of shape [n].

    Operation for operation torch.optim.SGD, so that meta_lr = 0 gives the same bits.
    """
    g = -g if h.maximize else g
    d = g.add(theta, alpha=h.weight_decay) if h.weight_decay else g
    u = d
    if h.momentum:
        v.mul_(h.momentum).add_(d, alpha=1 - h.dampening) if started else v.copy_(d)
        u = d.add(v, alpha=h.momentum) if h.nesterov else v
    theta.add_(u, alpha=-h.lr)


def meta_update(phi: Tensor, theta: Sequence[Tensor], h: Hyper) -> Tensor:
    """Δ = β (mean_t theta_t − phi): minus β times the Reptile gradient, averaged over the tasks in their order; [n]."""
    delta = sum((theta_t - phi for theta_t in theta[1:]), start=theta[0] - phi)
    return delta * (h.meta_lr / len(theta)) if h.meta_lr else torch.zeros_like(phi)


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
    for t in range(len(theta)):
        if g[t] is not None:
            inner_step_(theta[t], v[t], g[t], started[t], h)
    if phi is None:
        return
    if c.meta_update:
        delta = meta_update(phi, theta, h)
        phi.add_(delta)
        for theta_t in theta:
            theta_t.add_(delta, alpha=h.shift)
    if c.reset:
        for theta_t, v_t in zip(theta, v, strict=True):
            theta_t.copy_(phi)
            if c.reset_momentum:
                v_t.zero_()


def unavailable(device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
    """Why this backend cannot run there; None if it can."""
    return (
        "it takes its decisions on the host, which a captured step may not"
        if capturable and device.type != "cpu"
        else None
    )


class Launcher(Passes):
    """Runs the equations segment by segment over the flat buffers; low precision computes in float32 and rounds what it stores."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats = flats

    def __call__(self, gradients: Sequence[Tensor | None], hyper: Sequence[Hyper], control: Control) -> None:
        i = 0
        for flat in self.flats:
            work = flat.theta if flat.master is None else flat.master
            flat.hear_()
            for n, segment in enumerate(flat.segments):
                columns = slice(segment.offset, segment.offset + segment.numel)
                g = [
                    None if x is None else as_flat(x, flat.work_dtype) * control.inverse_scale
                    for x in gradients[i : i + flat.rows]
                ]
                control.flag_nonfinite(i, g)
                v = [row[columns].to(flat.work_dtype) for row in flat.momentum]
                shifting_step_(
                    None if flat.phi is None else flat.phi[columns],
                    [row[columns] for row in work], v, g, flat.started[n].tolist(), hyper[segment.group], control,
                )  # fmt: skip
                for row, v_t in zip(flat.momentum, v, strict=True):
                    row[columns].copy_(v_t)
                i += flat.rows
            if flat.master is not None:
                flat.theta.copy_(work)


def as_flat(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense gradient in memory order, [numel]."""
    return gradient.detach().as_strided((gradient.numel(),), (1,), gradient.storage_offset()).to(dtype)
