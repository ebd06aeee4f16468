"""`ShiftingMetaOptimizer`: continual trajectory shifting as a torch.optim optimizer over T task replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from cts_fast.distributed import Ranks, check_over_ranks, facts_of, facts_of_saved, together
from cts_fast.engine.arguments import (
    as_groups,
    check_initialization,
    check_needs,
    check_not_empty,
    named_heads,
    new_group,
    plain_number,
    read_group,
    read_needs,
    refuse_copying,
)
from cts_fast.engine.engine import Engine
from cts_fast.engine.plan import OPTIONS, Control, Counters, Counting, check_options, counted_step, next_step
from cts_fast.engine.rules.sgd import Hyper, check_hyper
from cts_fast.engine.saved import load_, packed, saved_state, with_clones
from cts_fast.engine.state import State, check_state_dict
from cts_fast.engine.step import Step, any_nonfinite, completed, shifting_step_
from cts_fast.engine.torch_hooks import after_hooks, with_torchs_hooks

values_of = itemgetter(*Hyper._fields)


class ShiftingMetaOptimizer(torch.optim.Optimizer):
    r"""Meta-learns one initialization φ of T tasks that train side by side, with a meta-update after every inner step.

    .. code-block:: text

        θ_t ← θ_t − α u_t                       SGD with momentum, as torch.optim.SGD, for every task t
        Δ = β (mean_t θ_t − φ);  φ ← φ + Δ      Reptile's meta-update, averaged over the tasks
        θ_t ← θ_t + Δ                           the shift: each trajectory follows its new start
        θ_t ← φ                                 the reset, after K steps

    Args:
        tasks: a list of T iterables of tensors or (name, tensor), alike in names, shapes, dtypes and order; or one such
            iterable (one task); or param-group dicts whose ``"params"`` are either of the two. Parameters become views
            of flat buffers.
        lr: α, the inner learning rate; a float or a one-element tensor.
        momentum, dampening, weight_decay, nesterov, maximize: the inner step's, as in torch.optim.SGD.
        meta_lr: β, the meta learning rate; a float or a one-element tensor.
        horizon: K, inner steps in a round; None: never reset by itself.
        meta_interval: a meta-update after every n-th inner step of a round (n = K is Reptile).
        shift: factor of the shift; 1 is the paper's, 0 leaves the trajectories where they are.
        reset_momentum: clear the shared momentum at a reset, so that a round depends on φ alone.
        heads: one iterable of parameters for each task; they take the inner step only and may differ between tasks.
        nonfinite: "ignore" NaN and infinite gradients as torch does, "raise" after the step that met one, or "skip" it.
        process_group: a torch.distributed group whose ranks each hold tasks of their own, any number; every rank makes
            the same calls. None talks to nobody.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference"; the environment's CTS_FAST_BACKEND sets what
            "auto" is.
        capturable: keep counters on the device and decide nothing on the host, for steps inside a CUDA graph.

    Between two steps a parameter's ``.data``, the parameters and options in `param_groups`, and `state` may be set from
    outside, as with any torch optimizer: the next step takes it over, or raises ValueError before anything moved.
    Weights loaded into all tasks before a round's first step are the new φ, unless φ was written itself. Batch-norm
    statistics are buffers, which neither φ nor a reset touches. Clipping the gradients of a whole group couples the
    tasks; clip each task's own parameters to keep them apart.

    Raises:
        ValueError, TypeError: bad input, naming task, parameter and reason. RuntimeError: why a backend cannot run.
        Over ranks also `cts_fast.distributed.RankError`, on all of them.

    Example:
        >>> opt = ShiftingMetaOptimizer([net.body.named_parameters() for net in nets], lr=0.01, momentum=0.9,
        ...                             meta_lr=0.01, horizon=1000, heads=[net.head.parameters() for net in nets])

    Source: Shin et al., "Large-Scale Meta-Learning with Continual Trajectory Shifting", ICML 2021, Algorithm 2.
    """

    _step_supports_amp_scaling = True
    needs: frozenset[str] = frozenset()  # what `step` must be given beside gradients: "losses", "heldout"
    buffers: Mapping[str, str] = {}  # what a method keeps beside φ, θ and momentum; see `Engine`
    own_values: Mapping[str, Any] = {}  # a method's further options
    one_process = ""  # why it takes no process group; "" if it does

    def __init__(
        self,
        tasks: Iterable,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        meta_lr: float | Tensor = 1e-2,
        horizon: int | None = 1000,
        meta_interval: int = 1,
        shift: float = 1.0,
        reset_momentum: bool = True,
        heads: Iterable | None = None,
        nonfinite: str = "ignore",
        process_group=None,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        rule: dict = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, maximize=maximize)
        hyper = Hyper(**rule, nesterov=nesterov, meta_lr=meta_lr, shift=shift)
        defaults = {**hyper._asdict(), "shared": True, "horizon": horizon, "meta_interval": meta_interval}
        defaults |= {"reset_momentum": reset_momentum, "capturable": capturable}
        defaults = {name: plain_number(value) for name, value in defaults.items()}
        self._nonfinite, self._built = nonfinite, False
        self.ranks = None if process_group is None else Ranks(process_group)
        with together(self.ranks, "the construction of an optimizer") as report:
            self.complete(defaults)
            check_hyper(defaults)
            check_options(defaults)
            if nonfinite not in ("ignore", "raise", "skip"):
                raise ValueError(f'Invalid nonfinite: {nonfinite!r}; known: "ignore", "raise", "skip"')
            check_over_ranks(self.ranks, type(self).__name__, self.one_process, capturable)
            self.engine = Engine(backend, nonfinite == "raise", self.buffers)
            super().__init__(as_groups(tasks), defaults)
            self.state: Any = State()
            self._add_heads(heads)
            self.engine.build(self.param_groups, self.state)
            if self.ranks is not None:
                report.tasks, report.facts = self.engine.num_tasks, self._facts()()
        self._built = True
        if self.ranks is not None:
            self.ranks.start_(self.engine)

    def _add_heads(self, heads: Iterable | None) -> None:
        """The last group, if there are any. Raises ValueError where no task has a parameter, or none is shared."""
        check_not_empty(self.param_groups)
        if heads is not None:
            named = "param_names" in self.param_groups[0]
            tensors = named_heads(heads, self.engine.num_tasks, named)
            if any(tensors):
                self.add_param_group({"params": tensors, "shared": False})

    def _facts(self) -> Callable[[], dict]:
        """What must be the same on every rank, to be called when it is asked for; it does not hold the optimizer."""
        further = {"the method": type(self).__name__, "nonfinite": self._nonfinite, **self._own_options()}
        further["whether a GradScaler is used"] = getattr(self, "found_inf", None) is not None
        return partial(facts_of, self.engine, self.param_groups, **further)

    def _own_options(self) -> dict[str, Any]:
        """A method's further options as they are now."""
        return {name: self.param_groups[0][name] for name in self.own_values}

    # Groups -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a group at any time: ``"params"`` of one task, or a list of T iterables, with options of its own.

        ``"shared": False`` makes it a head group. The flat buffers are laid out anew.
        Raises ValueError or TypeError, naming task, parameter and reason, and leaves the optimizer as it was.
        Over ranks every rank adds one.
        """
        if not self._built or self.ranks is None:
            self._add_group(param_group)
            return
        count = len(self.param_groups)
        try:
            with together(self.ranks, "add_param_group()") as report:
                self.ranks.refuse_torn()
                self._add_group(param_group)
                report.tasks, report.facts = self.engine.num_tasks, self._facts()()
        except Exception:
            added = [param for group in self.param_groups[count:] for param in group["params"]]
            del self.param_groups[count:]
            if added:  # another rank raised, or has added something else
                self.engine.forget_(added, self.param_groups, self.state)
            raise
        self.ranks.start_(self.engine)

    def _add_group(self, param_group: dict) -> None:
        group = new_group(param_group, self.defaults, self.engine.num_tasks or None)
        if self._built:
            self._sync()
            self.engine.rebind_(self.param_groups)
        super().add_param_group(group)
        if self._built:
            group.update({name: self.param_groups[0][name] for name in OPTIONS})  # as they are now
            try:
                self.engine.build(self.param_groups, self.state)
            except Exception:  # nothing was written yet
                self.param_groups.pop()
                raise
        self.engine.num_tasks = len(group["sizes"]) or self.engine.num_tasks

    def _sync(self) -> None:
        """Take over what was exchanged in `param_groups` and `state` from outside."""
        state = self.engine.sync_(self.param_groups, self.state)
        if state is not self.state:
            self.state = state

    def __getstate__(self) -> dict:
        refuse_copying(over_ranks=self.ranks is not None)
        names = self.engine.backend, self._nonfinite, self.engine.num_tasks
        groups = self.engine.readable(self.param_groups)
        saved = saved_state(self.engine, self.param_groups, self.state)
        return {**super().__getstate__(), "state": saved, "param_groups": groups, "made": names}

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        backend, self._nonfinite, num_tasks = state.pop("made")
        super().__setstate__(state)
        self.state = State(self.state)
        self.engine = Engine(backend, self._nonfinite == "raise", self.buffers)
        self.engine.num_tasks = num_tasks
        self.engine.build(self.param_groups, self.state)
        self.ranks, self._built = None, True

    def __copy__(self) -> ShiftingMetaOptimizer:
        """A second handle of the same buffers, groups and state, as a copied torch optimizer is."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    # The step ---------------------------------------------------------------------------------------------------------

    @with_torchs_hooks
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        losses: Iterable | None = None,
        heldout: Iterable[Callable] | None = None,
    ) -> float | None:
        """Inner step of all tasks, meta-update, shift and, at K, reset; nothing at all where no parameter has a
        gradient.

        closure: evaluates the losses again and returns what `step` returns; called once, with gradients enabled.
        losses, heldout: one a task, for methods of `cts_fast.baselines` that need them; read after the closure.
        Under torch.compile this is a graph break. Raises ValueError for sparse gradients, before anything moved.
        """
        try:
            check_needs(self.needs, self.engine.num_tasks, losses, heldout)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            given = read_needs(self.engine.num_tasks, losses, heldout)  # a closure may fill them
            step_ = self._step if self.ranks is None else self._step_over_ranks
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # what is made here is used by later steps
                    step_(*given)
            else:
                step_(*given)
        except Exception as error:
            self.failed(error)
            raise
        return loss

    def failed(self, error: Exception) -> None:
        """A step, or a hook before it, raised: the other ranks, if any, are informed."""
        if self.ranks is not None:
            self.ranks.share(error, self.engine, self.plan)

    def _step(self, losses: Sequence, heldout: Sequence[Callable]) -> None:
        engine = self.engine
        if not engine.flags_on_host:
            engine.report_nonfinite()
        self._sync()
        gradients = engine.collect(self.param_groups)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not engine.counting and float(found_inf):
            return
        if not any(collected.present for collected in gradients):
            return
        hyper = self.read_hyper()
        if engine.counting:
            engine.check_loaded_weights_()
            engine.warn_of_differing_replicas()
            control, counting = self.plan_on_device()
            self._step_on_device(Step(gradients, hyper, control, losses, heldout), counting)
            return
        *counters, skipped = engine.counters.read()
        if self._nonfinite == "skip" and any_nonfinite(engine, gradients):
            engine.counters.write((*counters, skipped + 1))
            return
        control, after = self.plan(Counters(*counters))
        if counters[0] == 0:
            engine.begin_round_()
        engine.warn_of_differing_replicas()
        values = (*after, skipped)
        control = completed(control, values, engine.counters, getattr(self, "grad_scale", None))
        self.apply_(Step(gradients, hyper, control, losses, heldout))
        engine.book_(values)
        if engine.flags_on_host:
            engine.report_nonfinite()
        else:
            engine.send_flags()

    def _step_over_ranks(self, losses: Sequence, heldout: Sequence[Callable]) -> None:
        """The step of this rank's tasks, with a gradient or without: all ranks do it, or none does."""
        engine, ranks = self.engine, cast(Ranks, self.ranks)
        ranks.check(engine)
        self._sync()
        gradients = engine.collect(self.param_groups)
        hyper = self.read_hyper()
        *counters, skipped = engine.counters.read()
        control, after = planned = self.plan(Counters(*counters))
        skips, found_inf = self._nonfinite == "skip", getattr(self, "found_inf", None)
        votes = skips or found_inf is not None
        settings = (*(hyper[g] for g in engine.shared_groups), *self._own_options().values())
        ranks.begin(engine, self._facts(), counters, planned, settings, votes)
        if votes:
            any_inf, nonfinite = ranks.vote(engine, found_inf, gradients if skips else ())
            if any_inf or nonfinite:
                engine.counters.write((*counters, skipped + (not any_inf)))
                ranks.end(engine)
                return
        if counters[0] == 0:
            ranks.begin_round_(engine)
        engine.warn_of_differing_replicas()
        values = (*after, skipped)
        ranks.moves()
        control = completed(control, values, engine.counters, getattr(self, "grad_scale", None))
        self.apply_(Step(gradients, hyper, control, losses, heldout))
        engine.book_(values)
        ranks.end(engine)

    @torch.no_grad()
    def _step_on_device(self, step: Step, counting: Counting) -> None:
        """The step with every decision left to the device, so that a CUDA graph may hold it."""
        if self._nonfinite == "skip":
            bad = any_nonfinite(self.engine, step.gradients)
            counting.counters[3] += bad.to(torch.int64)
            found_inf = bad if counting.found_inf is None else torch.maximum(counting.found_inf.view(()), bad)
            counting = counting._replace(found_inf=found_inf)
        self.apply_(step._replace(control=step.control._replace(counting=counting)))

    # Hooks for methods ------------------------------------------------------------------------------------------------

    def complete(self, options: dict[str, Any]) -> None:
        """Before the options of the whole optimizer are checked: a method checks its own, and sets what follows from
        them.
        """

    def plan(self, counters: Counters) -> tuple[Control, Counters]:
        """What the next step does, and the counters after it. A method whose meta-updates come at other times decides
        here.
        """
        return next_step(self.param_groups[0], counters, self.num_tasks)

    def plan_on_device(self) -> tuple[Control, Counting]:
        """As `plan`, where the device decides by its own counters (capturable)."""
        amp = (getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        return counted_step(self.param_groups[0], self.engine.counters.tensor, *amp, self.engine.num_tasks)

    def read_hyper(self) -> list[Hyper]:
        """Hyper-parameters of each param group, as they are now. Raises ValueError for those that no step can use."""
        engine = self.engine
        values = [value for group in self.param_groups for value in values_of(group)]
        if any(isinstance(value, Tensor) for value in values):  # it may change in place
            device = engine.counters.tensor.device if engine.counting else None
            return [read_group(group, device) for group in self.param_groups]
        if values != engine.hyper_values:
            engine.hyper = [read_group(group) for group in self.param_groups]
            engine.hyper_values = [value for group in self.param_groups for value in values_of(group)]
        return engine.hyper

    def apply_(self, step: Step) -> None:
        """The step itself, one fused pass, or two over ranks; in a method also what belongs to its own meta-update."""
        if self.ranks is not None and step.control.meta_update:
            self.ranks.step_(self.engine, step.gradients, step.hyper, step.control)
        else:
            shifting_step_(self.engine, step.gradients, step.hyper, step.control)

    # What users read and set ------------------------------------------------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks, of all ranks."""
        return self.engine.num_tasks if self.ranks is None else self.ranks.num_tasks

    @property
    def initialization(self) -> tuple[Tensor, ...]:
        """φ: one tensor for each shared parameter of a task, in their order; live views (float32 for low-precision
        parameters).
        """
        return tuple(self.engine.handed_out().values())

    @property
    def inner_step(self) -> int:
        """k: inner steps taken in this round; 0 right after a reset."""
        return self.engine.counters.read()[0]

    @property
    def round(self) -> int:
        """m: resets so far."""
        return self.engine.counters.read()[1]

    @property
    def meta_updates(self) -> int:
        """Meta-updates so far."""
        return self.engine.counters.read()[2]

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite (nonfinite="skip")."""
        return self.engine.counters.read()[3]

    @property
    def backend(self) -> str:
        """The name of the backend that runs (of the first device and dtype, where there are several)."""
        return self.engine.names[0]

    def initialization_state_dict(self) -> dict[str, Tensor]:
        """φ by parameter name, as live views; loads with ``module.load_state_dict(…, strict=False)``."""
        return self.engine.handed_out()

    @torch.no_grad()
    def load_initialization(self, values: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Set φ and every θ; the round starts anew (inner_step 0), `round` stays.

        values: tensors in the order of `initialization`, or a dict with at least its names.
        Raises ValueError, naming the parameter, for missing ones and other shapes.
        """
        given = check_initialization(values, self.engine.initialization)
        given = [value.detach().clone() for value in given]  # it may be φ itself in another order
        self._prepare_to_write()
        for phi, value in zip(self.engine.initialization.values(), given, strict=True):
            phi.copy_(value)
        self.reset_()
        self._mend(same_phi=True)

    @torch.no_grad()
    def reset_tasks(self) -> None:
        """The reset at K, now: θ ← φ for every task, shared momentum cleared if `reset_momentum`, inner_step 0, round +
        1.
        """
        self._prepare_to_write()
        self.reset_()
        inner_step, round_, *others = self.engine.counters.read()
        self.engine.counters.write((inner_step, round_ + 1, *others))
        self._mend(same_phi=False)

    def _mend(self, same_phi: bool) -> None:
        if self.ranks is not None:
            self.ranks.mend(same_phi)

    def _prepare_to_write(self) -> None:
        """Before buffers are written outside a step: what was exchanged lies in them, and replicas need no warning."""
        self._sync()
        self.engine.rebind_(self.param_groups)
        self.engine.differing = None

    def reset_(self) -> None:
        """θ ← φ for every task, inner_step 0; a method clears here what it keeps of a round. A hook; call
        `reset_tasks`.
        """
        self.engine.reset_(self.param_groups[0]["reset_momentum"])
        self.engine.counters.write((0, *self.engine.counters.read()[1:]))

    # State dicts ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that a bit-equal continuation needs, θ included, as references; see torch.optim.Optimizer.state_dict.

        It shows what parameters, `param_groups` and `state` hold now, and writes to none of them.
        """
        if self.ranks is None:
            self.engine.report_nonfinite()
        else:
            self.ranks.refuse_torn()
        after_hooks(self._optimizer_state_dict_pre_hooks, self)  # they see, and may edit, the live state
        state_dict = packed(self.param_groups, saved_state(self.engine, self.param_groups, self.state))
        return after_hooks(self._optimizer_state_dict_post_hooks, self, state_dict)

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping) -> None:
        """Continue from `state_dict`: θ, φ, momentum, counters and hyper-parameters, in place.

        Raises ValueError, before anything changed, for another number of tasks or groups, other names, shapes or
        dtypes. Over ranks each one loads its own, all at the same time; where one raises, or they do not fit together,
        all do.
        """
        engine = self.engine
        with together(self.ranks, "load_state_dict()") as report:
            if isinstance(state_dict, Mapping):
                state_dict = dict(state_dict)
            state_dict = after_hooks(self._optimizer_load_state_dict_pre_hooks, self, state_dict)
            self.state = engine.restored_state(self.param_groups, self.state)  # whatever it was, it is replaced
            groups, saved = check_state_dict(self.param_groups, engine.segments, engine.views, state_dict)
            # references to what is about to be written, perhaps in another order
            saved = [(param, with_clones(entry, engine.views[param])) for param, entry in saved]
            self._prepare_to_write()
            if self.ranks is not None:
                report.tasks = engine.num_tasks
                report.facts = facts_of_saved(groups, self.param_groups, saved, self.own_values)
        load_(engine, self.param_groups, groups, saved)
        self._mend(same_phi=True)
        after_hooks(self._optimizer_load_state_dict_post_hooks, self)
