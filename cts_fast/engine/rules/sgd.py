"""The inner rule of torch.optim.SGD: its hyper-parameters in the packed record's order, their checks, its state, its
equation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

from torch import Tensor

STATE = ("momentum_buffer",)  # what a parameter keeps between steps, in the parameter's dtype
WORDING = {  # of the hyper-parameters that may not be negative, as torch.optim.SGD's users know them
    "lr": "learning rate",
    "momentum": "momentum value",
    "weight_decay": "weight_decay value",
    "meta_lr": "meta learning rate",
}


class Hyper(NamedTuple):
    """Hyper-parameters of one param group, read at every step: those of the inner rule, then β = meta_lr and the
    shift's factor.

    This order is the native kernels' packed record; a tensor lr or meta_lr stays one only where the device reads it.
    """

    lr: float | Tensor = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    meta_lr: float | Tensor = 1e-2
    shift: float = 1.0

    @property
    def dampened(self) -> bool:
        """Whether a first gradient enters the momentum otherwise than later ones."""
        return bool(self.dampening and self.momentum)


def check_hyper(values: Mapping) -> None:
    """Raise ValueError, naming the option, for hyper-parameters that no step can use."""
    for name, default in Hyper._field_defaults.items():
        value = values[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
            if value.is_meta:
                raise ValueError(f"Invalid {WORDING.get(name, name)}: a tensor on the meta device holds no number")
            if not value.is_cpu:
                continue  # reading it would wait for the device
            value = value.item()
        if isinstance(default, bool):
            if not isinstance(value, Real):
                raise ValueError(f"Invalid {name}: {value!r}; it is True or False")
            continue
        if not isinstance(value, Real) or not math.isfinite(value) or (name in WORDING and value < 0):
            raise ValueError(f"Invalid {WORDING.get(name, name)}: {value}")
    if values["nesterov"] and (values["momentum"] <= 0 or values["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def inner_update_(theta: Tensor, v: Tensor, g: Tensor, started: bool, h: Hyper) -> None:
    """One step of one tensor of one task, theta and v in place; all of shape [n].

        d = ±g + λ θ;   v ← μ v + (1 − dampening) d  (its first gradient: v ← d)
        u = v  (Nesterov: d + μ v);   θ ← θ − α u

    Operation for operation torch.optim.SGD, so that meta_lr = 0 gives the same bits.
    """
    g = -g if h.maximize else g
    d = g.add(theta, alpha=h.weight_decay) if h.weight_decay else g
    u = d
    if h.momentum:
        v.mul_(h.momentum).add_(d, alpha=1 - h.dampening) if started else v.copy_(d)
        u = d.add(v, alpha=h.momentum) if h.nesterov else v
    theta.add_(u, alpha=-float(h.lr))
