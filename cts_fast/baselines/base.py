"""What the methods share: options of their own, buffers of their own in the state, and a meta-update of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Passes
from cts_fast.engine.gradients import Collector, Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.step import Control, Hyper, shifting_step_
from cts_fast.optimizer import ShiftingMetaOptimizer


class Method(ShiftingMetaOptimizer):
    """A method on the flat buffers of `ShiftingMetaOptimizer`; its options and what it shares are described there.

    A subclass names in `own_options` its further options, and in `buffers` the float buffers it keeps beside theta and
    phi: name → whether there is one row a task (laid out as theta) or one in all (as phi). Both are part of the state
    dict; a reset clears them (in `_apply_`, where a method ends its rounds itself).
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
                raise ValueError(
                    f"{name}: its meta-update comes at the end of a round, not every {options['meta_interval']} steps"
                )
            options["meta_interval"] = horizon
        super().__init__(tasks, lr, **options)
        self.defaults.update(own)
        for group in self.param_groups:
            group.update(own)

    def check_own_options(self, own: dict) -> None:
        """Raise ValueError for values of `own_options` that no step can use."""

    # Buffers ----------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        kept = (
            {p: {n: x for n, x in entry.items() if n in self.buffers} for p, entry in self.state.items()}
            if self.buffers
            else {}
        )
        super()._build()
        self._heldout_collectors: list[Collector] = []
        self._task_params = [
            [segment.params[row] for flat in self._shared() for segment in flat.segments]
            for row in range(self.num_tasks)
        ]
        self._own: list[dict[str, Tensor]] = []  # one entry a shared flat buffer: name → [T, S] or [S]
        for flat in self._shared():
            own = {
                name: torch.zeros_like(flat.theta if per_task else flat.phi, dtype=flat.work_dtype)
                for name, per_task in self.buffers.items()
            }
            self._own.append(own)
            for name, buffer in own.items():
                rows = buffer if self.buffers[name] else buffer[None]
                views = [flat.view(row, segment) for segment in flat.segments for row in rows]
                owners = flat.params if self.buffers[name] else [segment.params[0] for segment in flat.segments]
                for param, view in zip(owners, views, strict=True):
                    if name in kept.get(param, {}):
                        view.copy_(kept[param][name])
                    self.state[param][name] = view

    def _shared(self) -> list[Flat]:
        return [flats[0] for flats in self._flats if flats[0].shared]

    def _passes(self) -> list[Passes]:
        """What steps each shared buffer, for what a method does beside the step."""
        return [launcher for launcher, flats in zip(self._launchers, self._flats, strict=True) if flats[0].shared]

    def _launchers_of(self, shared_step: Callable) -> list[Callable]:
        """The optimizer's launchers, where they step shared parameters as shared_step(launcher, gradients, hyper, control)."""
        return [
            partial(shared_step, launcher) if flats[0].shared else launcher
            for launcher, flats in zip(self._launchers, self._flats, strict=True)
        ]

    def _reset_(self) -> None:
        super()._reset_()
        self._clear_()

    def _clear_(self) -> None:
        for buffer in chain.from_iterable(own.values() for own in self._own):
            buffer.zero_()

    # The step ---------------------------------------------------------------------------------------------------------

    def _plan(self, inner_step: int, round_: int, meta_updates: int) -> tuple[Control, tuple[int, int, int]]:
        self._follow_horizon()
        control, (inner_step, round_, after) = super()._plan(inner_step, round_, meta_updates)
        if self.once_a_round:  # also where a new horizon lies behind
            control, after = control._replace(meta_update=control.reset), meta_updates + control.reset
        return control, (inner_step, round_, after)

    def _step_on_device(self, *args) -> None:
        self._follow_horizon()
        super()._step_on_device(*args)

    def _follow_horizon(self) -> None:
        """The meta-update of methods of whole rounds stays at K where somebody sets a new K."""
        if self.once_a_round:
            for group in self.param_groups:
                group["meta_interval"] = group["horizon"]

    def _inner_step_(
        self, gradients, hyper: list[Hyper], control: Control, nonfinite, launchers: Sequence | None = None
    ) -> None:
        """The fused inner step of all tasks and nothing else; launchers: what runs it, if not the optimizer's."""
        inner = control._replace(meta_update=False, reset=False)
        shifting_step_(launchers or self._launchers, self._flats, gradients, hyper, inner, nonfinite)

    def _heldout_gradients(self, heldout: Sequence[Callable[[], Tensor]]) -> list[Gradients]:
        """∇ heldout_t(θ_t) of all tasks for each shared buffer: as many numbers as the training gradients are."""
        tasks = [self._task_gradients(loss, row) for row, loss in enumerate(heldout)]
        gradients = iter(chain.from_iterable(zip(*tasks, strict=True)))  # segment by segment and row by row
        if not self._heldout_collectors:
            self._heldout_collectors = [Collector([flat]) for flat in self._shared()]
        return [collect(list(islice(gradients, len(collect.params)))) for collect in self._heldout_collectors]

    def _task_gradients(self, heldout: Callable[[], Tensor], row: int) -> Sequence[Tensor | None]:
        """∇ of one task's held-out loss by its shared parameters; None where it does not depend on one."""
        return torch.autograd.grad(evaluate(heldout, row), self._task_params[row], allow_unused=True)

    def _end_round_(
        self, hyper: list[Hyper], control: Control, total: Sequence[Tensor | None], heldout: Sequence[Gradients | None] | None = None,
        weight: float = 0.0,
    ) -> None:  # fmt: skip
        """φ ← φ − β (total + weight Σ_t g_t^held), total ← 0, and the reset.

        total: [S] for each shared buffer, or None for 0; heldout: gradients for each, or None for none.
        """
        rates = [h.meta_lr for h in hyper]
        for passes, own, found in zip(self._passes(), total, heldout or [None] * len(total), strict=True):
            passes.end_round_(own, found, weight, rates, control.reset_momentum)
            passes.flats[0].note_write()


def evaluate(heldout: Callable[[], Tensor], row: int) -> Tensor:
    """A task's held-out loss with its graph. Raises ValueError if it has none."""
    with torch.enable_grad():
        loss = heldout()
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        raise ValueError(
            f"task {row}: its heldout returned {loss!r}; it must return one loss with its graph (do not detach it)"
        )
    return loss
