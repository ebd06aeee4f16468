"""The one in-place op of the package: the choice of a backend, and the step on the flat buffers."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper

if TYPE_CHECKING:
    from cts_fast.engine.engine import Engine
    from cts_fast.engine.state import Scalars


class Step(NamedTuple):
    """What one step works with, and a method of `cts_fast.baselines` acts on."""

    gradients: list[Gradients]  # of each device and dtype
    hyper: list[Hyper]  # of each param group
    control: Control
    losses: Sequence = ()  # what a method named in `needs`, one for each task
    heldout: Sequence[Callable[[], Tensor]] = ()


def completed(control: Control, values: Sequence[int], counters: Scalars, grad_scale: Tensor | None) -> Control:
    """With the gradients' scale, and the counters after the step."""
    return control._replace(
        inverse_scale=1.0 if grad_scale is None else 1.0 / grad_scale.item(),
        after=(counters.tensor.data_ptr(), values) if counters.on_host else None,
    )


BACKENDS = {  # name → module of cts_fast.engine.backends and its class
    "cuda": ("cuda", "Cuda"),
    "triton": ("triton", "Triton"),
    "cpu": ("cpu", "Cpu"),
    "torch": ("torch_ops", "TorchOps"),
    "reference": ("reference", "Reference"),
}
# fastest first, by device; others take "torch"
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}


def backend_class(name: str) -> type[Backend]:
    """The class of a backend by its name; ImportError, with the reason, where its module or what that needs is not
    there.
    """
    module, class_name = BACKENDS[name]
    return getattr(importlib.import_module(f"cts_fast.engine.backends.{module}"), class_name)


def unavailable(
    backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False, groups: int = 1
) -> str | None:
    """Why `backend` cannot run on that device and dtype with so many param groups; None if it can."""
    try:
        found = backend_class(backend)
    except ImportError as error:
        return str(error)
    return found.unavailable(device, dtype, capturable, groups)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, capturable: bool = False, groups: int = 1) -> str:
    """The name of the backend that runs: "auto" takes the environment's CTS_FAST_BACKEND, else the fastest that can.

    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot run. Where "auto" passes
    over a native module that is there and broken, or set up wrongly, it warns once.
    """
    if backend == "auto":
        backend = os.environ.get("CTS_FAST_BACKEND") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        names: Sequence[str] = (backend,)
    else:
        names = PREFERENCE.get(device.type, ("torch",))
    why = {}
    for name in names:
        reason = unavailable(name, device, dtype, capturable, groups)
        if reason is None:
            for passed_over, broken in why.items():
                if broken.startswith(FAULTS):
                    _warn_once(f"the {passed_over!r} backend is off, and {name!r} runs in its place: {broken}")
            return name
        why[name] = reason
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in why.items())
    raise RuntimeError(f"no backend can run {dtype} on {device}: {reasons}")


FAULTS = ("broken: ", "CTS_FAST_ISA=")  # how reasons begin that "auto" may not pass over in silence


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def counts_on_device(backends: Iterable[str]) -> bool:
    """Whether these backends can take a step's decisions on the device; the others take them on the host."""
    return all(backend_class(name).counts_on_device for name in backends)


def make_backend(name: str, flats: Sequence[Flat]) -> Backend:
    """A backend on these buffers, all of one device and dtype."""
    return backend_class(name)(flats)


@torch.no_grad()
def any_nonfinite(engine: Engine, gradients: Sequence[Gradients]) -> Tensor:
    """1.0 if a gradient holds a NaN or infinity, else 0.0: float32 on the first one's device, not waited for."""
    pairs = zip(engine.backends, gradients, strict=True)
    found = [backend.any_nonfinite(given) for backend, given in pairs if given.present]
    if len(found) > 1:
        found = [torch.stack([flag.to(found[0].device) for flag in found]).any()]
    return found[0].float()


def shifting_step_(
    engine: Engine,
    gradients: Sequence[Gradients],
    hyper: Sequence[Hyper],
    control: Control,
    shared_step: Callable[..., object] | None = None,
) -> None:
    """Inner step, meta-update, shift and, if control.reset, reset of all tasks, in place (Shin et al., 2021).

        θ_t ← θ_t − α u_t;   Δ = β (mean_t θ_t − φ);   φ ← φ + Δ;   θ_t ← θ_t + shift · Δ;   at K: θ_t ← φ

    One launch for each device and dtype, which gradients has an entry for each; hyper: one a param group.
    shared_step(backend, gradients, hyper, control): what a method runs in the place of `step_` where there are shared
    parameters.
    """
    final = len(engine.backends) - 1
    clears = control.reset and control.reset_momentum
    for i, backend in enumerate(engine.backends):
        own = control
        if control.counting is not None:
            own = control._replace(counting=control.counting._replace(advances=i == final))
        elif i < final:
            own = control._replace(after=None)  # the last launch ends the step
        if engine.flags is not None:
            own = own._replace(nonfinite=engine.flags[i])
        for flat in backend.flats:  # here, while collecting has their tensors in the cache
            flat.note_write()
            flat.all_started = flat.all_started and not (clears and flat.shared)
        if shared_step is not None and backend.flats[0].shared:
            shared_step(backend, gradients[i], hyper, own)
        else:
            backend.step_(gradients[i], hyper, own)
        if control.counting is None:
            _note_started_(backend.flats, gradients[i], hyper, clears)


def _note_started_(flats: Sequence[Flat], gradients: Gradients, hyper: Sequence[Hyper], clears: bool) -> None:
    """Note which momentum has taken its first gradient now, and which a reset has cleared."""
    every = gradients.present == len(gradients) and all(h.momentum for h in hyper)
    first = 0
    for flat in flats:
        last = first + flat.started.numel()
        if clears and flat.shared:
            flat.forget_started_()
        elif not flat.all_started and every:
            flat.started.fill_(1)
            flat.all_started = True
        elif not flat.all_started and any(h.momentum for h in hyper):
            present = torch.tensor([gradient is not None for gradient in gradients[first:last]], device="cpu")
            momentum = torch.tensor([hyper[segment.group].momentum != 0 for segment in flat.segments], device="cpu")
            flat.started |= present.view_as(flat.started) & momentum[:, None]
            flat.all_started = bool(flat.started.all())
        first = last
