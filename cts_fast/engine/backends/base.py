"""The contract of a backend: one fused step on the buffers of one device and dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.method_ops import MethodOps
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # dtype → its number in native code
CONTROL_FIELDS = 5  # of Control, the first that native code reads: meta_update … inverse_scale


def packed_flat(flat: Flat) -> tuple:
    """The buffers of one `Flat` as native code reads them (csrc/python/records.h)."""
    buffers = (flat.phi, flat.theta, flat.momentum, flat.master)
    return (*(0 if tensor is None else tensor.data_ptr() for tensor in buffers), flat.theta.stride(0), flat.rows)


class Backend(MethodOps, ABC):
    """Steps the buffers of one device and dtype: flats[0] the shared parameters, then heads (or heads alone).

    Where other processes hold further tasks, a step with a meta-update comes in two halves, `partial_` and `finish_`,
    and whoever calls them adds the totals up in between. `control.num_tasks` is T of the mean, never a buffer's number
    of rows.
    """

    counts_on_device = False  # whether it can take a captured step's decisions on the device

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, capturable: bool, groups: int) -> str | None:
        """Why it cannot run there with so many param groups; None if it can, as what decides on the host can anywhere
        but in a captured step."""
        if capturable and device.type != "cpu":
            return "it takes its decisions on the host, which a captured step may not"
        return None

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats = flats

    @abstractmethod
    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        """Inner step, meta-update, shift and, if control.reset, reset, in one pass; hyper: one a param group."""

    @abstractmethod
    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        """The first half: θ_t ← θ′_t, the inner step, heads included; total ← Σ_t (θ′_t − φ) over the rows.

        total: [S] in phi's dtype, overwritten. Momentum that the reset of this step clears is cleared here. Only where
        flats[0] is shared.
        """

    @abstractmethod
    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        """The second half: Δ = β/T total; φ ← φ + Δ; θ_t ← θ′_t + shift · Δ; if control.reset, θ_t ← φ.

        total: [S], summed over all tasks; it is only read.
        """

    def is_at_phi(self) -> bool:
        """Whether θ is φ in every row of flats[0], bit for bit; waits for the device, once."""
        return self.flats[0].is_at_phi()

    def any_nonfinite(self, gradients: Gradients) -> Tensor:
        """Whether a gradient holds a NaN or an infinity: bool, on the device, not waited for."""
        present = [g for g in gradients if g is not None and g.numel()]
        if not present:  # empty ones alone
            return torch.zeros((), dtype=torch.bool, device=self.flats[0].device)
        return ~torch.stack(torch._foreach_norm(present, float("inf"))).isfinite().all()
