"""What the methods share: options of their own, buffers of their own in the state, and a meta-update of their own.

A method overrides the optimizer's hooks: `plan` (when a meta-update and a reset come), `read_hyper`, `apply_` (the step
and what belongs to it) and `reset_`. Buffers, backends and counters are `self.engine`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice

import torch
from torch import Tensor

from cts_fast.engine.arguments import plain_number
from cts_fast.engine.gradients import Collector, Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control, Counters, Counting
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.step import shifting_step_
from cts_fast.optimizer import ShiftingMetaOptimizer, Step


class Method(ShiftingMetaOptimizer):
    """A method on the flat buffers of `ShiftingMetaOptimizer`; its options and what it shares are described there.

    A subclass names in `own_options` its further options, and in `buffers` what it keeps beside theta and phi: name →
    "task" (a row a task, laid out as theta), "point" (the same, at theta where a parameter is new), "shared" (one in
    all, as phi) or "number" (one a task). Both are part of the state dict; a reset clears the buffers (in `apply_`,
    where a method ends its rounds itself).
    """

    own_options: Mapping[str, object] = {}
    once_a_round = False  # the meta-update comes at K alone
    _heldout_flats: Sequence[Flat] = ()  # what the collectors of held-out gradients were made for
    _heldout_collectors: Sequence[Collector] = ()
    on_host = False  # it takes decisions on the host, which a captured step may not

    def __init__(self, tasks, lr: float | Tensor = 1e-3, **options) -> None:
        given = {name: options.pop(name, default) for name, default in self.own_options.items()}
        self.own_values = {name: plain_number(value) for name, value in given.items()}
        super().__init__(tasks, lr, **options)

    def complete(self, options: dict) -> None:
        self.check_own_options(dict(self.own_values))
        options.update(self.own_values)
        name = type(self).__name__
        if self.on_host and options["capturable"]:
            raise ValueError(f"{name}: takes its decisions on the host; use capturable=False")
        if self.once_a_round:
            horizon, interval = options["horizon"], options["meta_interval"]
            if horizon is None:
                raise ValueError(f"{name}: its meta-update comes at the end of a round; give a horizon")
            if interval not in (1, horizon):
                raise ValueError(f"{name}: its meta-update comes at the end of a round, not every {interval} steps")
            options["meta_interval"] = horizon

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for values of `own_options` that no step can use."""

    # What it works on -------------------------------------------------------------------------------------------------

    def shared_flats(self) -> list[Flat]:
        """The shared parameters' buffers, one for each device and dtype."""
        return [flat for _, flat in self.engine.shared]

    def task_params(self, row: int) -> list[Tensor]:
        """The shared parameters of one task, in the order of the buffers."""
        return [segment.params[row] for flat in self.shared_flats() for segment in flat.segments]

    def clear_buffers_(self) -> None:
        """Forget what the method kept of a round."""
        for buffer in chain.from_iterable(flat.own.values() for flat in self.shared_flats()):
            buffer.zero_()

    def reset_(self) -> None:
        super().reset_()
        self.clear_buffers_()

    # The step ---------------------------------------------------------------------------------------------------------

    def read_hyper(self) -> list[Hyper]:
        self.check_own_options({name: self.param_groups[0][name] for name in self.own_options})  # as they are now
        return super().read_hyper()

    def plan(self, counters: Counters) -> tuple[Control, Counters]:
        self._follow_horizon()
        control, after = super().plan(counters)
        if self.once_a_round:  # also where a new horizon lies behind
            control = control._replace(meta_update=control.reset)
            after = after._replace(meta_updates=counters.meta_updates + control.reset)
        return control, after

    def plan_on_device(self) -> tuple[Control, Counting]:
        self._follow_horizon()
        return super().plan_on_device()

    def _follow_horizon(self) -> None:
        """The meta-update of methods of whole rounds stays at K where somebody sets a new K."""
        if self.once_a_round:
            for group in self.param_groups:
                group["meta_interval"] = group["horizon"]

    def update_tasks_(self, step: Step, shared_step: Callable[..., object] | None = None) -> None:
        """The fused inner step of all tasks and nothing else; shared_step: what runs it on shared parameters, if not
        the backend's.
        """
        inner = step.control._replace(meta_update=False, reset=False, after=None)
        shifting_step_(self.engine, step.gradients, step.hyper, inner, shared_step)

    @contextmanager
    def inner_step_counts(self) -> Iterator[None]:
        """Where anything raises inside, as a user's held-out function may, the inner step that was taken is counted:
        the next call of `step` takes the next one, and ends the round if this one should have.
        """
        try:
            yield
        except BaseException:
            inner_step, *others = self.engine.counters.read()
            self.engine.counters.write((inner_step + 1, *others))
            raise

    def heldout_gradients(self, heldout: Sequence[Callable[[], Tensor]]) -> list[Gradients]:
        """∇ heldout_t(θ_t) of all tasks for each shared buffer: as many numbers as the training gradients are."""
        tasks = [self.task_gradients(loss, row) for row, loss in enumerate(heldout)]
        gradients = iter(chain.from_iterable(zip(*tasks, strict=True)))  # segment by segment and row by row
        flats = self.shared_flats()
        if self._heldout_flats != flats:  # they were laid out anew
            self._heldout_flats, self._heldout_collectors = flats, [Collector([flat]) for flat in flats]
        collectors = self._heldout_collectors
        found = [collect(list(islice(gradients, len(collect.params)))) for collect in collectors]
        if any(collect.moved for collect in collectors):  # a held-out function may exchange a parameter's storage
            self.engine.rebind_(self.param_groups)
        return found

    def task_gradients(self, heldout: Callable[[], Tensor], row: int) -> list[Tensor | None]:
        """∇ of one task's held-out loss by its shared parameters; None where it does not depend on one."""
        return gradients_by(self.task_params(row), evaluate(heldout, row))

    def over_ranks(self, total: list[Tensor]) -> list[Tensor]:
        """The sums over all ranks of what this one has summed over its tasks: [S] for each shared buffer."""
        return total if self.ranks is None else self.ranks.summed(self.engine, total)

    def end_round_(
        self,
        hyper: list[Hyper],
        control: Control,
        total: Sequence[Tensor | None],
        heldout: Sequence[Gradients | None] | None = None,
        weight: float = 0.0,
    ) -> None:
        """φ ← φ − β (total + weight Σ_t g_t^held), total ← 0, and the reset.

        total: [S] for each shared buffer, or None for 0; heldout: gradients for each, or None for none.
        """
        rates = [float(h.meta_lr) for h in hyper]
        for (backend, flat), own, found in zip(self.engine.shared, total, heldout or [None] * len(total), strict=True):
            backend.end_round_(own, found, weight, rates, control.reset_momentum)
            flat.note_write()


def gradients_by(
    params: Sequence[Tensor], of: Tensor | list[Tensor], vectors: list[Tensor] | None = None, **options
) -> list[Tensor | None]:
    """`torch.autograd.grad` of tensors, times the vectors, by each parameter; None for one that is frozen or not in
    them.
    """
    trained = [param for param in params if param.requires_grad]
    found = iter(torch.autograd.grad(of, trained, vectors, **options, allow_unused=True) if trained else ())
    return [next(found) if param.requires_grad else None for param in params]


def evaluate(heldout: Callable[[], Tensor], row: int) -> Tensor:
    """A task's held-out loss with its graph. Raises ValueError if it has none."""
    with torch.enable_grad():
        loss = heldout()
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        raise ValueError(
            f"task {row}: its heldout returned {loss!r}; it must return one loss with its graph (do not detach it)"
        )
    return loss
