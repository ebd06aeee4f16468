"""What a step does besides the inner step: a meta-update, a reset, and what the counters say after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

from torch import Tensor

NEVER = 1 << 62  # a horizon that no round reaches
OPTIONS = (
    "horizon",
    "meta_interval",
    "reset_momentum",
    "capturable",
)  # of the whole optimizer; every group carries them


class Counting(NamedTuple):
    """Where a captured step finds what the host may not decide: the kernel reads it and, after its last block, advances
    it.
    """

    counters: Tensor  # int64: inner_step, round, meta_updates, skipped_steps
    horizon: int  # NEVER: no reset
    meta_interval: int
    found_inf: Tensor | None  # float32, one element: not 0 where nothing may change
    grad_scale: Tensor | None  # float32, one element: gradients are divided by it
    advances: bool = True  # this launch is the last of its step and advances the counters


class Control(NamedTuple):
    """What this step does besides the inner step. Under `counting` the device decides about meta-update, reset and
    scale.
    """

    meta_update: bool
    reset: bool
    reset_momentum: bool
    num_tasks: int  # T of the mean
    inverse_scale: float = 1.0  # gradients are multiplied by it (mixed precision)
    after: tuple | None = None  # (address, values) of the host's counters, which native code sets when the step is done
    nonfinite: Tensor | None = None  # uint8, one per gradient in collected order: set to 1 where one is NaN or infinite
    counting: Counting | None = None

    def flag_nonfinite(self, first: int, gradients: Sequence[Tensor | None]) -> None:
        """Set the flags first, first + 1, … of gradients that hold a NaN or infinity."""
        if self.nonfinite is not None:
            for i, gradient in enumerate(gradients, first):
                if gradient is not None:
                    self.nonfinite[i] |= ~gradient.isfinite().all()


class Counters(NamedTuple):
    """The counters that a step advances: k, m and the number of meta-updates."""

    inner_step: int
    round: int
    meta_updates: int


def check_options(options: Mapping) -> None:
    """Raise ValueError for options of the whole optimizer that no step can use."""
    horizon, meta_interval = options["horizon"], options["meta_interval"]
    if horizon is not None and (not isinstance(horizon, Integral) or horizon < 1):
        raise ValueError(f"Invalid horizon: {horizon}; it is a number of steps ≥ 1, or None for no resets")
    if not isinstance(meta_interval, Integral) or meta_interval < 1:
        raise ValueError(f"Invalid meta_interval: {meta_interval}; it is a number of steps ≥ 1")
    if not isinstance(options["reset_momentum"], Integral):
        raise ValueError(f"Invalid reset_momentum: {options['reset_momentum']!r}; it is True or False")


def next_step(options: Mapping, now: Counters, num_tasks: int) -> tuple[Control, Counters]:
    """What the next step does, and the counters after it: a meta-update every meta_interval steps, the reset at the
    horizon.
    """
    check_options(options)
    inner_step = now.inner_step + 1
    meta_update = inner_step % options["meta_interval"] == 0
    reset = options["horizon"] is not None and inner_step >= options["horizon"]
    after = Counters(0 if reset else inner_step, now.round + reset, now.meta_updates + meta_update)
    return Control(meta_update, reset, options["reset_momentum"], num_tasks), after


def counted_step(
    options: Mapping, counters: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None, num_tasks: int
) -> tuple[Control, Counting]:
    """As `next_step`, where the device decides by its own counters."""
    check_options(options)
    horizon = NEVER if options["horizon"] is None else options["horizon"]
    counting = Counting(counters, horizon, options["meta_interval"], found_inf, grad_scale)
    return Control(False, False, options["reset_momentum"], num_tasks), counting
