"""`ShiftingMetaOptimizer`: continual trajectory shifting as a torch.optim optimizer over T task replicas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import chain
from operator import is_, itemgetter

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from cts_fast.engine.arguments import (
    PER_GROUP,
    as_groups,
    check_hyper,
    check_needs,
    check_options,
    check_parameters,
    drop_duplicates,
    split_tasks,
)
from cts_fast.engine.counters import NAMES as COUNTERS
from cts_fast.engine.counters import Numbers
from cts_fast.engine.gradients import Collector, adopt_moved_, check_moved
from cts_fast.engine.layout import Flat, Segment, make_flats
from cts_fast.engine.saved import matching
from cts_fast.engine.step import (
    BACKENDS,
    NEVER,
    Control,
    Counting,
    Hyper,
    any_nonfinite,
    counts_on_device,
    make_launcher,
    resolve,
    shifting_step_,
)

OPTIONS = (
    "horizon",
    "meta_interval",
    "reset_momentum",
    "capturable",
)  # of the whole optimizer; every group carries them


_values_of = itemgetter(*PER_GROUP)


def _checked(values: Sequence) -> Hyper:
    """The values of PER_GROUP as hyper-parameters; raises ValueError for those that no step can use."""
    named = dict(zip(PER_GROUP, values, strict=True))
    check_hyper(named)
    return Hyper(**named)


def _heard_by_torch(step: Callable) -> Callable:
    """What torch.optim puts around `step`: hooks and the profiler's label; and, under torch.compile, a graph break.

    It is entered only where somebody listens: with cold caches it costs a tenth of a small network's step.
    """
    eager = torch._disable_dynamo(step)
    wrapped = torch._disable_dynamo(torch.optim.Optimizer.profile_hook_step(step))

    @wraps(step)
    def heard(self, *args, **kwargs):
        compiles = torch.compiler.is_compiling()
        if type(self).step is not heard:  # torch wraps a subclass's own step by itself
            return (eager if compiles else step)(self, *args, **kwargs)
        listens = (
            compiles
            or profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        return (wrapped if listens else step)(self, *args, **kwargs)

    heard.hooked = True  # by this mark torch.optim.Optimizer knows that it need not wrap it
    return heard


class ShiftingMetaOptimizer(torch.optim.Optimizer):
    r"""Meta-learns one initialization φ of T tasks that train side by side, with a meta-update after every inner step.

    .. code-block:: text

        θ_t ← θ_t − α u_t                       SGD with momentum, as torch.optim.SGD, for every task t
        Δ = β (mean_t θ_t − φ);  φ ← φ + Δ      Reptile's meta-update, averaged over the tasks
        θ_t ← θ_t + Δ                           the shift: each trajectory follows its new start
        θ_t ← φ                                 the reset, after K steps

    Args:
        tasks: a list of T iterables of tensors or (name, tensor), alike in names, shapes, dtypes and order; or one such iterable (one task);
            or param-group dicts whose ``"params"`` are either of the two. Parameters become views of flat buffers.
        lr: α, the inner learning rate; a float or a one-element tensor.
        momentum, dampening, weight_decay, nesterov, maximize: the inner step's, as in torch.optim.SGD.
        meta_lr: β, the meta learning rate; a float or a one-element tensor.
        horizon: K, inner steps in a round; None: never reset by itself.
        meta_interval: a meta-update after every n-th inner step of a round (n = K is Reptile).
        shift: factor of the shift; 1 is the paper's, 0 leaves the trajectories where they are.
        reset_momentum: clear the shared momentum at a reset, so that a round depends on φ alone.
        heads: one iterable of parameters for each task; they take the inner step only and may differ between tasks.
        nonfinite: "ignore" NaN and infinite gradients as torch does, "raise" after the step that met one, or "skip" such steps.
        process_group: not available in this version; give None.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference"; the environment's CTS_FAST_BACKEND sets what "auto" is.
        capturable: keep counters on the device and decide nothing on the host, for steps inside a CUDA graph.

    Clipping the gradients of a whole group couples the tasks; clip each task's own parameters to keep them apart.

    Raises:
        ValueError, TypeError: bad input, naming task, parameter and reason. RuntimeError: a backend that cannot run, and why.

    Example:
        >>> opt = ShiftingMetaOptimizer([net.body.named_parameters() for net in nets], lr=0.01, momentum=0.9,
        ...                             meta_lr=0.01, horizon=1000, heads=[net.head.parameters() for net in nets])

    Source: Shin et al., "Large-Scale Meta-Learning with Continual Trajectory Shifting", ICML 2021, Algorithm 2.
    """

    _step_supports_amp_scaling = True
    needs: frozenset[str] = (
        frozenset()
    )  # what `step` must be given beside gradients: "losses", "heldout" (see cts_fast.baselines)

    def __init__(
        self, tasks: Iterable, lr: float | Tensor = 1e-3, *, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, maximize: bool = False, meta_lr: float | Tensor = 1e-2, horizon: int | None = 1000, meta_interval: int = 1,
        shift: float = 1.0, reset_momentum: bool = True, heads: Iterable | None = None, nonfinite: str = "ignore", process_group=None,
        backend: str = "auto", capturable: bool = False,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, meta_lr=meta_lr,
            shift=shift, shared=True, horizon=horizon, meta_interval=meta_interval, reset_momentum=reset_momentum, capturable=capturable,
        )  # fmt: skip
        check_hyper(defaults)
        check_options(horizon, meta_interval)
        if nonfinite not in ("ignore", "raise", "skip"):
            raise ValueError(f'Invalid nonfinite: {nonfinite!r}; known: "ignore", "raise", "skip"')
        if process_group is not None:
            raise ValueError("process_group: this version runs all tasks in one process; give process_group=None")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
        self._nonfinite, self._backend_choice = nonfinite, backend
        self._num_tasks: int | None = None
        self._built = False
        super().__init__(as_groups(tasks), defaults)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("optimizer got an empty parameter list: no task has a parameter")
        if heads is not None:
            self._add_heads(heads)
        if not any(group["shared"] and group["params"] for group in self.param_groups):
            raise ValueError(
                "every group is a head group (shared=False) or empty; an initialization needs shared parameters"
            )
        self._build()

    # Groups ----------------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a group at any time: ``"params"`` of one task, or a list of T iterables, with options of its own.

        ``"shared": False`` makes it a head group. The flat buffers are laid out anew: take `initialization` afterwards.
        Raises ValueError or TypeError, naming task, parameter and reason, and leaves the optimizer as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for name in (*OPTIONS, "heads", "nonfinite", "process_group", "backend"):
            if name in param_group:
                raise ValueError(f"{name} belongs to the whole optimizer and cannot be set for a group")
        check_hyper({**self.defaults, **param_group})
        shared = param_group.get("shared", True)
        tasks = drop_duplicates(split_tasks(param_group["params"], self._num_tasks))
        check_parameters(tasks, shared)
        group = {
            **param_group,
            "params": list(chain.from_iterable(tasks)),
            "shared": shared,
            "sizes": [len(task) for task in tasks],
        }
        if self._built:
            self._take_back_()
        super().add_param_group(group)
        if self._built:
            try:
                self._build()
            except Exception:  # nothing was written yet
                self.param_groups.pop()
                raise
        self._num_tasks = len(tasks) or self._num_tasks

    def _add_heads(self, heads: Iterable) -> None:
        heads = [list(head) for head in heads]
        if len(heads) != self._num_tasks:
            raise ValueError(
                f"heads of {len(heads)} tasks given, but there are {self._num_tasks} tasks; give one iterable a task"
            )
        if not any(heads):
            return
        named = "param_names" in self.param_groups[0]
        tensors = [[item[1] if isinstance(item, tuple) else item for item in head] for head in heads]
        if named:  # torch wants names in all groups or in none
            tensors = [
                [
                    (item[0] if isinstance(item, tuple) else f"head.{i}", tensor)
                    for i, (item, tensor) in enumerate(zip(head, own, strict=True))
                ]
                for head, own in zip(heads, tensors, strict=True)
            ]
        self.add_param_group({"params": tensors, "shared": False})

    def _segments(self) -> list[Segment]:
        segments = []
        shared = 0
        for g, group in enumerate(self.param_groups):
            params, names, sizes = group["params"], group.get("param_names"), group["sizes"]
            starts = [sum(sizes[:t]) for t in range(len(sizes))]
            if group["shared"]:
                for n in range(sizes[0] if sizes else 0):
                    segments.append(
                        Segment(g, names[n] if names else str(shared), [params[start + n] for start in starts])
                    )
                    shared += 1
            else:
                for t, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                    for n in range(size):
                        segments.append(
                            Segment(g, names[start + n] if names else f"head.{n}", [params[start + n]], task=t)
                        )
        return segments

    # Buffers ---------------------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Lay out flat buffers for all groups, fill them from `state` or, for new parameters, from the first task, and bind views.

        All that can fail comes before the first write.
        """
        segments = self._segments()
        shared = [segment for segment in segments if segment.task is None]
        names = [segment.name for segment in shared]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"parameter {twice!r}: two shared parameters have that name; names of the initialization must differ"
            )
        capturable = self.param_groups[0]["capturable"]
        by_kind: dict[tuple, dict[bool, list[Segment]]] = {}
        for segment in segments:
            first = segment.params[0]
            by_kind.setdefault((first.device, first.dtype), {}).setdefault(segment.task is None, []).append(segment)
        backends = [
            resolve(self._backend_choice, device, dtype, capturable, len(self.param_groups))
            for device, dtype in by_kind
        ]
        counting = capturable and counts_on_device(backends)
        if counting and len({device for device, _ in by_kind}) > 1:
            raise ValueError(
                "capturable=True: one step's counters live on one device, but the parameters are on several"
            )
        flats = [make_flats(kind, counting) for kind in by_kind.values()]
        collectors = [Collector(kind) for kind in flats]
        launchers = [make_launcher(name, kind) for name, kind in zip(backends, flats, strict=True)]
        self._warn_of_differing_replicas([segment for segment in shared if segment.params[0] not in self.state])

        first = segments[0].params[0]
        counters = self.state[first].get("counters") if first in self.state else None
        if counters is None:
            counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=first.device if capturable else "cpu")
        for flat in chain.from_iterable(flats):
            self._fill_(flat)
        self.state[first]["counters"], self._counters = counters, Numbers(counters)
        self._backends, self._counting, self._flats, self._collectors, self._launchers = (
            backends,
            counting,
            flats,
            collectors,
            launchers,
        )
        self._initialization = {segment.name: self.state[segment.params[0]]["initialization"] for segment in shared}
        raises = self._nonfinite == "raise"
        self._flags = (
            [torch.zeros(sum(len(f.params) for f in kind), dtype=torch.uint8, device=kind[0].device) for kind in flats]
            if raises
            else None
        )
        self._hyper_values: list = []  # what `_known_hyper` was made from, the objects themselves
        self._built = True

    @staticmethod
    def _warn_of_differing_replicas(segments: list[Segment]) -> None:
        for segment in segments:
            first = segment.params[0].detach()
            for row, param in enumerate(segment.params[1:], 1):
                if not torch.equal(param.nan_to_num(), first.nan_to_num()):
                    warnings.warn(
                        f"{segment.where(row)}: differs from task 0; every task starts at task 0's parameters",
                        stacklevel=5,
                    )
                    return

    def _fill_(self, flat: Flat) -> None:
        """Values of one flat buffer and the views in `state`: from `state` where a parameter has an entry, else from the parameters."""
        for n, segment in enumerate(flat.segments):
            known = segment.params[0] in self.state
            start = segment.params[0].detach().clone()
            for row, param in enumerate(segment.params):
                flat.adopt_(n, row)
                views = flat.state(n, row)
                if known:
                    for name, view in views.items():
                        view.copy_(self.state[param][name])
                elif flat.shared:
                    param.data.copy_(start)
                    views["theta"].copy_(start)
                    if row == 0:
                        views["initialization"].copy_(start)
                self.state[param] = views

    def _take_back_(self) -> None:
        """Hear what users wrote to parameters since the last step, exchanged storages included."""
        for flat in chain.from_iterable(self._flats):
            check_moved(flat)
        for flat in chain.from_iterable(self._flats):
            adopt_moved_(flat)
            flat.hear_()

    def __getstate__(self) -> dict:
        self._take_back_()
        own = ("_nonfinite", "_backend_choice", "_num_tasks")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._build()

    # The step --------------------------------------------------------------------------------------------------------------------

    @_heard_by_torch
    def step(
        self, closure: Callable[[], float] | None = None, *, losses: Sequence | None = None, heldout: Sequence[Callable] | None = None
    ) -> float | None:  # fmt: skip
        """Inner step of all tasks, meta-update, shift and, at K, reset; nothing at all where no parameter has a gradient.

        closure: evaluates the losses again and returns what `step` returns; called once, with gradients enabled.
        losses, heldout: for the methods of `cts_fast.baselines` that name them in `needs`; not read by this one.
        Under torch.compile this is a graph break. Raises ValueError for sparse gradients, before anything moved.
        """
        check_needs(self.needs, self._num_tasks, losses, heldout)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._report_nonfinite()
        gradients = [collect() for collect in self._collectors]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not self._counting and found_inf.item():
            return loss
        if not any(collected.count for collected in gradients):
            return loss
        hyper = self._hyper()
        if self._counting:
            self._step_on_device(gradients, hyper, losses, heldout)
            return loss
        inner_step, round_, meta_updates, skipped = self._counters.read()
        if self._nonfinite == "skip" and any_nonfinite(gradients):
            self._counters.write((inner_step, round_, meta_updates, skipped + 1))
            return loss

        control, counted = self._plan(inner_step, round_, meta_updates)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            control = control._replace(inverse_scale=1.0 / scale.item())
        self._apply_(gradients, hyper, control, self._flags, losses, heldout)
        self._counters.write((*counted, skipped))
        if self._flags and all(flags.device.type == "cpu" for flags in self._flags):
            self._report_nonfinite()
        return loss

    @torch.no_grad()
    def _step_on_device(self, gradients, hyper: list[Hyper], losses, heldout) -> None:
        """The step with every decision left to the device, so that a CUDA graph may hold it."""
        options = self.param_groups[0]
        check_options(options["horizon"], options["meta_interval"])
        found_inf = getattr(self, "found_inf", None)
        if self._nonfinite == "skip":
            bad = any_nonfinite(gradients)
            self._counters.tensor[3] += bad.to(torch.int64)
            found_inf = bad if found_inf is None else torch.maximum(found_inf.view(()), bad)
        horizon = NEVER if options["horizon"] is None else options["horizon"]
        counting = Counting(
            self._counters.tensor, horizon, options["meta_interval"], found_inf, getattr(self, "grad_scale", None)
        )
        control = Control(False, False, options["reset_momentum"], counting=counting)
        self._apply_(gradients, hyper, control, self._flags, losses, heldout)

    def _plan(self, inner_step: int, round_: int, meta_updates: int) -> tuple[Control, tuple[int, int, int]]:
        """What the next step does, and the three counters after it."""
        options = self.param_groups[0]
        check_options(options["horizon"], options["meta_interval"])
        inner_step += 1
        meta_update = inner_step % options["meta_interval"] == 0
        reset = options["horizon"] is not None and inner_step >= options["horizon"]
        return Control(meta_update, reset, options["reset_momentum"]), (
            0 if reset else inner_step,
            round_ + reset,
            meta_updates + meta_update,
        )

    def _apply_(self, gradients, hyper: list[Hyper], control: Control, nonfinite, losses, heldout) -> None:
        """The step itself; another method of `cts_fast.baselines` puts its own meta-update here."""
        shifting_step_(self._launchers, self._flats, gradients, hyper, control, nonfinite)

    def _hyper(self) -> list[Hyper]:
        values = [value for group in self.param_groups for value in _values_of(group)]
        if len(values) != len(self._hyper_values) or not all(map(is_, values, self._hyper_values)):  # somebody set one
            self._known_hyper = [
                _checked([self._read(value) for value in _values_of(group)]) for group in self.param_groups
            ]
            changes_in_place = any(isinstance(value, Tensor) for value in values)
            self._hyper_values = [] if changes_in_place else values
        return self._known_hyper

    def _read(self, value):
        """The number that a tensor hyper-parameter holds; the device reads its own in a captured step, in no other does the host take part."""
        if isinstance(value, Tensor) and not (self._counting and value.device == self._counters.tensor.device):
            return value.item()
        return value

    def _report_nonfinite(self) -> None:
        if not self._flags or (
            any(flags.is_cuda for flags in self._flags) and torch.cuda.is_current_stream_capturing()
        ):
            return
        for flags, flats in zip(self._flags, self._flats, strict=True):
            for i in flags.nonzero().flatten().tolist():
                for seen in self._flags:
                    seen.zero_()
                places = [segment.where(row) for flat in flats for segment in flat.segments for row in range(flat.rows)]
                raise RuntimeError(
                    f"{places[i]}: the gradient of the last step held a NaN or an infinity; that step was applied"
                )

    # What users read and set -------------------------------------------------------------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self._num_tasks

    @property
    def initialization(self) -> tuple[Tensor, ...]:
        """φ: one tensor for each shared parameter of a task, in their order; live views (float32 for low-precision parameters)."""
        return tuple(self._initialization.values())

    @property
    def inner_step(self) -> int:
        """k: inner steps taken in this round; 0 right after a reset."""
        return self._counters.read()[0]

    @property
    def round(self) -> int:
        """m: resets so far."""
        return self._counters.read()[1]

    @property
    def meta_updates(self) -> int:
        """Meta-updates so far."""
        return self._counters.read()[2]

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite (nonfinite="skip")."""
        return self._counters.read()[3]

    @property
    def backend(self) -> str:
        """The name of the backend that runs (of the first device and dtype, where there are several)."""
        return self._backends[0]

    def initialization_state_dict(self) -> dict[str, Tensor]:
        """φ by parameter name, as live views; loads with ``module.load_state_dict(…, strict=False)``."""
        return dict(self._initialization)

    @torch.no_grad()
    def load_initialization(self, values: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Set φ and every θ; the round starts anew (inner_step 0), `round` stays.

        values: tensors in the order of `initialization`, or a dict with at least its names.
        Raises ValueError, naming the parameter, for missing ones and other shapes.
        """
        if isinstance(values, Mapping):
            missing = [name for name in self._initialization if name not in values]
            if missing:
                raise ValueError(f"parameter {missing[0]!r}: not in the given initialization")
            values = [values[name] for name in self._initialization]
        values = list(values)
        if len(values) != len(self._initialization):
            raise ValueError(f"{len(values)} tensors given, but the initialization has {len(self._initialization)}")
        for (name, phi), value in zip(self._initialization.items(), values, strict=True):
            if (
                not isinstance(value, Tensor)
                or value.shape != phi.shape
                or not value.is_floating_point()
                or value.layout != torch.strided
            ):
                given = (
                    f"{value.dtype} {tuple(value.shape)}, {value.layout}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(
                    f"parameter {name!r}: {given} given, but a dense real tensor of {tuple(phi.shape)} is needed"
                )
        self._take_back_()
        for phi, value in zip(self._initialization.values(), values, strict=True):
            phi.copy_(value)
        self._reset_()

    @torch.no_grad()
    def reset_tasks(self) -> None:
        """The reset at K, now: θ ← φ for every task, shared momentum cleared if `reset_momentum`, inner_step 0, round + 1."""
        self._take_back_()
        self._reset_()
        inner_step, round_, *others = self._counters.read()
        self._counters.write((inner_step, round_ + 1, *others))

    def _reset_(self) -> None:
        for launcher, (flat, *_) in zip(self._launchers, self._flats, strict=True):
            if flat.shared:
                launcher.reset_(self.param_groups[0]["reset_momentum"])
                flat.note_write()
        self._counters.write((0, *self._counters.read()[1:]))

    # State dicts -------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that a bit-equal continuation needs, θ included, as references; see torch.optim.Optimizer.state_dict."""
        self._report_nonfinite()
        self._take_back_()
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping) -> None:
        """Continue from `state_dict`: θ, φ, momentum, counters and hyper-parameters, in place.

        Raises ValueError, before anything changed, for another number of tasks or groups, other names, shapes or dtypes.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved_groups, saved = matching(self, state_dict)

        self._take_back_()
        for param, entry in saved:
            for name, view in self.state[param].items():
                view.copy_(entry[name])
        for flat in chain.from_iterable(self._flats):
            flat.all_started = False
            if flat.master is not None:
                flat.theta.copy_(flat.master)
            flat.note_write()
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            kept = ("params", "param_names", "capturable", "shared", "sizes")
            group.update({name: value for name, value in saved_group.items() if name not in kept})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
