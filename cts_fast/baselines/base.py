"""What the methods share: options of their own, buffers of their own in the state, and a meta-update of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from cts_fast.flat import Flat, Segment
from cts_fast.ops import Control, Hyper
from cts_fast.optimizer import ShiftingMetaOptimizer


class Method(ShiftingMetaOptimizer):
    """A method on the flat buffers of `ShiftingMetaOptimizer`; its options and what it shares are described there.

    A subclass names in `own_options` its further options, and in `buffers` the float buffers it keeps beside theta and phi: name →
    whether there is one row a task (laid out as theta) or one in all (as phi). Both are part of the state dict.
    """

    own_options: dict[str, object] = {}
    buffers: dict[str, bool] = {}
    once_a_round = False  # the meta-update comes at K alone
    on_host = False  # it takes decisions on the host, which a captured step may not

    def __init__(self, tasks, lr: float | Tensor = 1e-3, **options) -> None:
        own = {name: options.pop(name, default) for name, default in self.own_options.items()}
        self.check_own_options(own)
        name = type(self).__name__
        if self.on_host and options.get("capturable"):
            raise ValueError(f"{name}: takes its decisions on the host; use capturable=False")
        if self.once_a_round:
            horizon = options.get("horizon", 1000)
            if horizon is None:
                raise ValueError(f"{name}: its meta-update comes at the end of a round; give a horizon")
            if options.setdefault("meta_interval", horizon) not in (1, horizon):
                raise ValueError(f"{name}: its meta-update comes at the end of a round, not every {options['meta_interval']} steps")
            options["meta_interval"] = horizon
        super().__init__(tasks, lr, **options)
        self.defaults.update(own)
        for group in self.param_groups:
            group.update(own)

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for values of `own_options` that no step can use."""

    # Buffers ---------------------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        kept = {p: {n: x for n, x in entry.items() if n in self.buffers} for p, entry in self.state.items()} if self.buffers else {}
        super()._build()
        self._own: list[dict[str, Tensor]] = []
        for flat in self._shared():
            own = {name: torch.zeros_like(flat.theta if per_task else flat.phi, dtype=flat.work_dtype) for name, per_task in self.buffers.items()}
            self._own.append(own)
            for name, buffer in own.items():
                rows = buffer if self.buffers[name] else buffer[None]
                for segment in flat.segments:
                    for row, values in enumerate(rows):
                        param, view = segment.params[row], flat.view(values, segment)
                        if name in kept.get(param, {}):
                            view.copy_(kept[param][name])
                        self.state[param][name] = view

    def _shared(self) -> list[Flat]:
        return [flat for flat in chain.from_iterable(self._flats) if flat.shared]

    def _reset_(self) -> None:
        super()._reset_()
        self._clear_()

    def _clear_(self) -> None:
        for buffer in chain.from_iterable(own.values() for own in self._own):
            buffer.zero_()

    # The step --------------------------------------------------------------------------------------------------------------------

    def _inner_step_(self, gradients, hyper: list[Hyper], control: Control, nonfinite) -> None:
        """The fused inner step of all tasks and nothing else."""
        super()._apply_(gradients, hyper, control._replace(meta_update=False, reset=False), nonfinite, None, None)

    def _finish_(self, hyper: list[Hyper], control: Control) -> None:
        """phi ← phi − β meta_gradient (descent on the meta-loss) where a meta-update is due, and the reset."""
        for flat, own in zip(self._shared(), self._own, strict=True):
            if control.meta_update:
                for columns, h in blocks(flat, hyper):
                    flat.phi[columns].sub_(own["meta_gradient"][columns], alpha=h.meta_lr)
            if control.reset:
                flat.reset_(control.reset_momentum)
            torch.autograd.graph.increment_version(flat.written)
        if control.reset:
            self._clear_()


def blocks(flat: Flat, hyper: Sequence[Hyper]) -> Iterator[tuple[slice, Hyper]]:
    """Columns of each run of segments that belong to one param group, padding included, and the group's hyper-parameters."""
    segments, first = flat.segments, 0
    for n in range(1, len(segments) + 1):
        if n == len(segments) or segments[n].group != segments[first].group:
            end = flat.columns if n == len(segments) else segments[n].offset
            yield slice(segments[first].offset, end), hyper[segments[first].group]
            first = n


def work_theta(flat: Flat) -> Tensor:
    """theta [T, S] in the precision that the step computes in."""
    return flat.theta if flat.master is None else flat.master


def segment_values(values: Tensor, segment: Segment) -> Tensor:
    """The tensor's values in memory order, [numel]; values: dense, of the segment's shape and strides."""
    return values.detach().as_strided((segment.numel,), (1,), values.storage_offset())


def copy_gradients_(target: Tensor, flat: Flat, gradients: Sequence[Tensor | None]) -> Tensor:
    """Fill target [T, S] with collected gradients of the flat; a missing one is zero."""
    for n, segment in enumerate(flat.segments):
        columns = slice(segment.offset, segment.offset + segment.numel)
        for row, gradient in enumerate(gradients[n * flat.rows : (n + 1) * flat.rows]):
            if gradient is None:
                target[row, columns].zero_()
            else:
                target[row, columns].copy_(segment_values(gradient, segment))
    return target
