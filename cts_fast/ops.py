"""The one in-place op of the package: checks, the choice of a backend, and the step on the flat buffers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cts_fast.flat import Flat, Segment

BACKENDS = {  # name → module with `unavailable(device, dtype, capturable)` and `Launcher(flats)`
    "cuda": "cts_fast.cuda",
    "triton": "cts_fast.kernels.shifting_step",
    "cpu": "cts_fast.cpu",
    "torch": "cts_fast.torch_backend",
    "reference": "cts_fast.reference",
}
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}  # fastest first, by device; others take "torch"


class Hyper(NamedTuple):
    """Hyper-parameters of one param group, read at this step; α = lr, β = meta_lr."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    meta_lr: float
    shift: float


class Control(NamedTuple):
    """What this step does besides the inner step."""

    meta_update: bool
    reset: bool
    reset_momentum: bool
    inverse_scale: float = 1.0  # gradients are multiplied by it (mixed precision)
    nonfinite: Tensor | None = None  # uint8, one per gradient in collected order: set to 1 where one is NaN or infinite

    def flag_nonfinite(self, first: int, gradients: Sequence[Tensor | None]) -> None:
        """Set the flags first, first + 1, … of gradients that hold a NaN or infinity."""
        if self.nonfinite is not None:
            for i, gradient in enumerate(gradients, first):
                if gradient is not None:
                    self.nonfinite[i] |= ~gradient.isfinite().all()


def unavailable(backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False) -> str | None:
    """Why `backend` cannot run on that device and dtype; None if it can."""
    try:
        module = importlib.import_module(BACKENDS[backend])
    except ImportError as error:
        return str(error)
    return module.unavailable(device, dtype, capturable)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False) -> str:
    """The name of the backend that runs: "auto" takes the environment's CTS_FAST_BACKEND, else the fastest that can.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run.
    """
    if backend == "auto":
        backend = os.environ.get("CTS_FAST_BACKEND", "auto")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    names = PREFERENCE.get(device.type, ("torch",)) if backend == "auto" else (backend,)
    why = {}
    for name in names:
        reason = unavailable(name, device, dtype, capturable)
        if reason is None:
            return name
        why[name] = reason
    raise RuntimeError(f"no backend can run {dtype} on {device}: " + "; ".join(f"{name!r}: {reason}" for name, reason in why.items()))


def make_launcher(backend: str, flats: Sequence[Flat]):
    """The callable (gradients, hyper, control) → None that steps these buffers, all of one device and dtype."""
    return importlib.import_module(BACKENDS[backend]).Launcher(flats)


def collect_gradients_(flats: Sequence[Flat]) -> list[Tensor | None]:
    """Every replica's gradient, segment by segment and row by row, dense in its parameter's memory order; None where there is none.

    Parameters whose storage was exchanged (`p.data = …`, deepcopy, share_memory_) are taken back into the flat buffers first.
    Raises ValueError naming task and parameter, before anything moved, for sparse gradients and other dtypes or devices.
    """
    gradients: list[Tensor | None] = []
    for flat in flats:
        for segment in flat.segments:
            for row, param in enumerate(segment.params):
                gradient = param.grad
                if gradient is not None and (gradient.layout != torch.strided or gradient.stride() != segment.stride or gradient.dtype != flat.dtype):
                    gradient = _dense(gradient, flat, segment, row)
                gradients.append(gradient)
    for flat in flats:
        adopt_moved_(flat)
    return gradients


def _dense(gradient: Tensor, flat: Flat, segment: Segment, row: int) -> Tensor:
    flat.check_param(segment, row)
    if gradient.layout != torch.strided:
        raise ValueError(f"{segment.where(row)}: gradient is {gradient.layout}; the step takes dense gradients (use sparse=False)")
    if gradient.dtype != flat.dtype or gradient.device != flat.device:
        raise ValueError(f"{segment.where(row)}: gradient is {gradient.dtype} on {gradient.device}, the parameter {flat.dtype} on {flat.device}")
    return torch.empty_strided(segment.shape, segment.stride, dtype=flat.dtype, device=flat.device).copy_(gradient)


def adopt_moved_(flat: Flat) -> None:
    """Take parameters whose storage was exchanged back into the flat buffer."""
    size, bases = flat.dtype.itemsize, [row.data_ptr() for row in flat.theta]
    for n, segment in enumerate(flat.segments):
        for row, param in enumerate(segment.params):
            if segment.numel and param.data_ptr() != bases[row] + segment.offset * size:
                flat.adopt_(n, row)


def all_finite(gradients: Iterable[Sequence[Tensor | None]]) -> bool:
    """Whether no gradient holds a NaN or infinity; waits for the device."""
    norms = [torch._foreach_norm([g for g in group if g is not None and g.numel()], float("inf")) for group in gradients]
    return all(bool(torch.stack(group).isfinite().all()) for group in norms if group)


def shifting_step_(
    launchers: Sequence, flats: Sequence[Sequence[Flat]], gradients: Sequence[Sequence[Tensor | None]], hyper: Sequence[Hyper],
    control: Control, nonfinite: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """Inner step, meta-update, shift and, if control.reset, reset of all tasks, in place (Algorithm 2 of Shin et al., 2021).

        θ_t ← θ_t − α u_t;   Δ = β (mean_t θ_t − φ);   φ ← φ + Δ;   θ_t ← θ_t + shift · Δ;   at K: θ_t ← φ

    One launch for each device and dtype. launchers, flats, gradients, nonfinite: one entry for each of those. hyper: one a param group.
    """
    for i, launcher in enumerate(launchers):
        launcher(gradients[i], hyper, control if nonfinite is None else control._replace(nonfinite=nonfinite[i]))
        _after_step_(flats[i], gradients[i], hyper, control)


def _after_step_(flats: Sequence[Flat], gradients: Sequence[Tensor | None], hyper: Sequence[Hyper], control: Control) -> None:
    """Keep the first-gradient flags, and tell autograd of writes that went behind its back."""
    first = 0
    for flat in flats:
        if not flat.all_started:
            present = torch.tensor([gradient is not None for gradient in gradients[first : first + flat.started.numel()]])
            uses_momentum = torch.tensor([hyper[segment.group].momentum != 0 for segment in flat.segments])
            flat.started |= present.view_as(flat.started) & uses_momentum[:, None]
            flat.all_started = bool(flat.started.all())
        if control.reset and control.reset_momentum and flat.shared:
            flat.started.zero_()
            flat.all_started = False
        torch.autograd.graph.increment_version(flat.written)
        first += flat.started.numel()
