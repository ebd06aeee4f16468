"""The one in-place op of the package: the choice of a backend, and the step on the flat buffers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat

BACKENDS = {  # name → module with `unavailable(device, dtype, capturable, groups)` and `Launcher(flats)`, a `passes.Passes`
    "cuda": "cts_fast.engine.backends.cuda",
    "triton": "cts_fast.kernels.shifting_step",
    "cpu": "cts_fast.engine.backends.cpu",
    "torch": "cts_fast.engine.backends.torch_ops",
    "reference": "cts_fast.engine.backends.reference",
}
PREFERENCE = {
    "cuda": ("cuda", "triton", "torch"),
    "cpu": ("cpu", "torch"),
}  # fastest first, by device; others take "torch"


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


NEVER = 1 << 62  # a horizon that no round reaches


class Counting(NamedTuple):
    """Where a captured step finds what the host may not decide: the kernel reads it and, after its last block, advances it."""

    counters: Tensor  # int64: inner_step, round, meta_updates, skipped_steps
    horizon: int  # NEVER: no reset
    meta_interval: int
    found_inf: Tensor | None  # float32, one element: not 0 where nothing may change
    grad_scale: Tensor | None  # float32, one element: gradients are divided by it
    advances: bool = True  # this launch is the last of its step and advances the counters


class Control(NamedTuple):
    """What this step does besides the inner step. Under `counting` the device decides about meta-update, reset and scale."""

    meta_update: bool
    reset: bool
    reset_momentum: bool
    inverse_scale: float = 1.0  # gradients are multiplied by it (mixed precision)
    nonfinite: Tensor | None = None  # uint8, one per gradient in collected order: set to 1 where one is NaN or infinite
    counting: Counting | None = None

    def flag_nonfinite(self, first: int, gradients: Sequence[Tensor | None]) -> None:
        """Set the flags first, first + 1, … of gradients that hold a NaN or infinity."""
        if self.nonfinite is not None:
            for i, gradient in enumerate(gradients, first):
                if gradient is not None:
                    self.nonfinite[i] |= ~gradient.isfinite().all()


def unavailable(
    backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False, groups: int = 1
) -> str | None:
    """Why `backend` cannot run on that device and dtype with so many param groups; None if it can."""
    try:
        module = importlib.import_module(BACKENDS[backend])
    except ImportError as error:
        return str(error)
    return module.unavailable(device, dtype, capturable, groups)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False, groups: int = 1) -> str:
    """The name of the backend that runs: "auto" takes the environment's CTS_FAST_BACKEND, else the fastest that can.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run.
    """
    if backend == "auto":
        backend = os.environ.get("CTS_FAST_BACKEND") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    names = PREFERENCE.get(device.type, ("torch",)) if backend == "auto" else (backend,)
    why = {}
    for name in names:
        reason = unavailable(name, device, dtype, capturable, groups)
        if reason is None:
            return name
        why[name] = reason
    raise RuntimeError(
        f"no backend can run {dtype} on {device}: " + "; ".join(f"{name!r}: {reason}" for name, reason in why.items())
    )


def counts_on_device(backends: Iterable[str]) -> bool:
    """Whether these backends can take a step's decisions on the device; the others take them on the host."""
    return all(getattr(importlib.import_module(BACKENDS[name]).Launcher, "on_device", False) for name in backends)


def make_launcher(backend: str, flats: Sequence[Flat]):
    """The callable (gradients, hyper, control) that steps these buffers, all of one device and dtype."""
    return importlib.import_module(BACKENDS[backend]).Launcher(flats)


@torch.no_grad()
def any_nonfinite(gradients: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """1.0 if a gradient holds a NaN or infinity, else 0.0: a float32 scalar on the first one's device, not waited for."""
    present = [[g for g in group if g is not None and g.numel()] for group in gradients]
    flags = [~torch.stack(torch._foreach_norm(group, float("inf"))).isfinite().all() for group in present if group]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any().float() if flags else torch.zeros(())


def shifting_step_(
    launchers: Sequence, flats: Sequence[Sequence[Flat]], gradients: Sequence[Gradients], hyper: Sequence[Hyper],
    control: Control, nonfinite: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """Inner step, meta-update, shift and, if control.reset, reset of all tasks, in place (Algorithm 2 of Shin et al., 2021).

        θ_t ← θ_t − α u_t;   Δ = β (mean_t θ_t − φ);   φ ← φ + Δ;   θ_t ← θ_t + shift · Δ;   at K: θ_t ← φ

    One launch for each device and dtype. launchers, flats, gradients, nonfinite: one entry for each of those. hyper: one a param group.
    """
    for i, launcher in enumerate(launchers):
        if control.counting is not None:
            control = control._replace(counting=control.counting._replace(advances=i == len(launchers) - 1))
        for flat in flats[i]:  # here, while collecting has their tensors in the cache
            flat.note_write()
        launcher(gradients[i], hyper, control if nonfinite is None else control._replace(nonfinite=nonfinite[i]))
        if control.counting is None:
            _keep_started_(flats[i], gradients[i], hyper, control)


def _keep_started_(flats: Sequence[Flat], gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
    """Note which momentum has taken its first gradient now, and which a reset has cleared."""
    every = gradients.count == len(gradients) and all(h.momentum for h in hyper)
    first = 0
    for flat in flats:
        last = first + flat.started.numel()
        if control.reset and control.reset_momentum and flat.shared:
            flat.forget_started_()
        elif not flat.all_started and every:
            flat.started.fill_(1)
            flat.all_started = True
        elif not flat.all_started and any(h.momentum for h in hyper):
            present = torch.tensor([gradient is not None for gradient in gradients[first:last]], device="cpu")
            uses_momentum = torch.tensor(
                [hyper[segment.group].momentum != 0 for segment in flat.segments], device="cpu"
            )
            flat.started |= present.view_as(flat.started) & uses_momentum[:, None]
            flat.all_started = bool(flat.started.all())
        first = last
