"""The flat buffers under an optimizer's groups, and one truth about them: what users hold is what steps.

Between two steps a parameter's `.data`, the Parameters in `param_groups`, and `opt.state` may be exchanged from
outside. `sync_` and `collect` take over what was exchanged, or refuse it before anything moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from cts_fast.engine.arguments import check_memory, regroup
from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Collector, Gradients, same_objects
from cts_fast.engine.layout import MOMENTUM, Flat, Segment, make_flats, make_segments, refuse_shared
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.state import COUNTERS, Scalars, State, check_value
from cts_fast.engine.step import counts_on_device, make_backend, resolve

HERE = "in opt.state"


class Engine:
    """Buffers, backends and counters of one optimizer; laid out by `build`, stepped by `shifting_step_`.

    backend: the name that was asked for. flags_nonfinite: whether a step flags gradients that are not finite. own:
    further buffers of a method, name → "task" ([T, P]), "shared" ([P]) or "number" (one float64 a task); they are part
    of the state.
    """

    def __init__(self, backend: str, flags_nonfinite: bool, own: Mapping[str, str]) -> None:
        self.backend, self.flags_nonfinite, self.own = backend, flags_nonfinite, dict(own)
        self.num_tasks = 0
        self.flats: list[list[Flat]] = []  # a list for each device and dtype: shared parameters, then heads
        self.backends: list[Backend] = []
        self.names: list[str] = []  # of the backends
        self.collectors: list[Collector] = []
        self.places: dict[Tensor, tuple[Flat, int, int]] = {}  # where a parameter lies: flat, segment, row
        self.views: dict[Tensor, dict[str, Tensor]] = {}  # what an entry of `state` holds while nobody exchanged it
        self.initialization: dict[str, Tensor] = {}  # φ by name
        with torch.inference_mode(False):
            self.counters = Scalars(torch.zeros(len(COUNTERS), dtype=torch.int64, device="cpu"))
        self.numbers: dict[str, Scalars] = {}
        self.hyper: list[Hyper] = []  # as last read, made from hyper_values
        self.hyper_values: list = []
        self.flags: list[Tensor] | None = None  # nonfinite="raise": one byte a gradient
        self.counting = False  # whether the device takes a step's decisions
        self.segments: list[Segment] = []
        self.groups: list[tuple[list, list, bool]] = []  # (parameters, sizes, shared) of each group, as laid out
        self.state = State()
        self.differing: str | None = None  # where replicas differed from task 0 when they were laid out

    # Layout -----------------------------------------------------------------------------------------------------------

    def build(self, groups: Sequence[dict], state: State) -> None:
        """Lay out flat buffers for all groups, fill them from `state` and the parameters, and bind the parameters to
        them.

        All that can fail comes before the first write. What others hold of older buffers stays as it is.
        """
        with torch.inference_mode(False), torch.no_grad():
            segments = make_segments(groups)
            shared = [segment for segment in segments if segment.task is None]
            check_memory(segments)
            kinds: dict[tuple[torch.device, torch.dtype], dict[bool, list[Segment]]] = {}
            for segment in segments:
                first = segment.params[0]
                alike = kinds.setdefault((first.device, first.dtype), {})
                alike.setdefault(segment.task is None, []).append(segment)
            capturable = groups[0]["capturable"]
            names = [resolve(self.backend, device, dtype, capturable, len(groups)) for device, dtype in kinds]
            counting = capturable and counts_on_device(names)
            if counting and len({device for device, _ in kinds}) > 1:
                raise ValueError(
                    "capturable=True: one step's counters live on one device, but the parameters are on several"
                )
            flats = [make_flats(kind, counting, self.own) for kind in kinds.values()]
            collectors = [Collector(kind) for kind in flats]
            backends = [make_backend(name, kind) for name, kind in zip(names, flats, strict=True)]
            home = segments[0].params[0]
            counters = self._counters(segments, state).to(home.device if capturable else "cpu")

            old, self.views, self.places, self.differing = self.views, {}, {}, None
            state.everything = True  # should an interrupt come in between, the next step looks at all of it
            for flat in chain.from_iterable(flats):
                self._fill_(flat, state, old)
            self.views[home]["counters"] = counters
            self.counters = Scalars(counters)
            self._add_numbers(shared[0], state)
        for param, views in self.views.items():
            state.show(param, views)
        self._watch(state)
        self.flats, self.names, self.backends, self.collectors = flats, names, backends, collectors
        self.counting, self.segments = counting, segments
        self.initialization = {s.name: self.views[s.params[0]]["initialization"] for s in shared}
        self.groups = [(list(group["params"]), list(group["sizes"]), group["shared"]) for group in groups]
        if self.flags_nonfinite:
            self.flags = [
                torch.zeros(len(collector.params), dtype=torch.uint8, device=kind[0].device)
                for collector, kind in zip(collectors, flats, strict=True)
            ]

    def _counters(self, segments: Sequence[Segment], state: State) -> Tensor:
        """The tensor of counters: the one in `state`, which may be a checkpoint's, else this engine's own."""
        for param in chain.from_iterable(segment.params for segment in segments):
            entry = state.entry(param)
            if isinstance(entry, dict) and isinstance(entry.get("counters"), Tensor):
                return entry["counters"]
        return self.counters.tensor

    def _fill_(self, flat: Flat, state: State, old: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Values and views of one flat buffer: from `state` where a parameter has an entry, else from the first task's
        parameter.
        """
        for n, segment in enumerate(flat.segments):
            entries = [state.entry(param) or {} for param in segment.params]
            start = segment.params[0].detach().clone()
            known = not flat.shared or any("initialization" in entry or "theta" in entry for entry in entries)
            for row, (param, entry) in enumerate(zip(segment.params, entries, strict=True)):
                views = flat.state(n, row)
                if not known:
                    self._compare(segment, row, param, start)
                if row == 0 and flat.shared:
                    views["initialization"].copy_(start)
                for name, view in views.items():  # a master of theta stays if the parameter is its rounding still
                    if name in entry:
                        view.copy_(entry[name])
                flat.adopt_(n, row, param if known else start)
                self.places[param] = (flat, n, row)
                self.views[param] = _same_objects(views, old.get(param, {}))
            if flat.shared:
                flat.initialization[n] = self.views[segment.params[0]]["initialization"]
        flat.note_written()

    def _compare(self, segment: Segment, row: int, param: Tensor, start: Tensor) -> None:
        if self.differing is None and not torch.equal(param.nan_to_num(), start.nan_to_num()):
            self.differing = f"{segment.where(row)}: differs from task 0; every task starts at task 0's parameters"

    def _add_numbers(self, segment: Segment, state: State) -> None:
        """A method's numbers, one a task, kept with each task's first shared parameter."""
        for name in (name for name, kind in self.own.items() if kind == "number"):
            numbers = torch.zeros(len(segment.params), dtype=torch.float64, device="cpu")
            for i, param in enumerate(segment.params):
                numbers[i] = (state.entry(param) or {}).get(name, 0.0)
                self.views[param][name] = numbers[i]
            self.numbers[name] = Scalars(numbers)

    def _watch(self, state: State) -> None:
        self.state, state.everything = state, False
        state.seen.clear()

    # One truth --------------------------------------------------------------------------------------------------------

    def sync_(self, groups: list[dict], state: Any) -> State:
        """Take over groups, Parameters and state that were exchanged since the last step; returns the state, always a
        `State`.

        Raises ValueError, before anything moved, for what cannot be taken over.
        """
        if state is not self.state or state.everything or state.seen or self._is_phi_moved():
            state = self._take_over_state_(state)
        if not self._as_laid_out(groups):
            self._regroup_(groups, state)
        return state

    def _as_laid_out(self, groups: list[dict]) -> bool:
        if len(groups) != len(self.groups):
            return False
        for group, (params, sizes, shared) in zip(groups, self.groups, strict=True):
            now = group.get("params") if isinstance(group, dict) else None
            if not isinstance(now, list) or not same_objects(now, params):
                return False
            if group.get("shared") is not shared or group.get("sizes") != sizes:
                return False
        return True

    def _regroup_(self, groups: list[dict], state: State) -> None:
        """Lay out anew what the groups hold now: parameters that went rest, and a new one takes its predecessor's
        place.
        """
        found = regroup(groups, self.groups, self.num_tasks)
        for new, before in found.predecessors.items():
            if state.entry(new) is None and new.shape == before.shape:
                views = self.views[before]  # φ and the counters go on; momentum starts anew
                state.put(new, {name: views[name] for name in ("initialization", "counters") if name in views})
        for group, sizes, shared in zip(groups, found.sizes, found.shared, strict=True):
            group["sizes"], group["shared"] = sizes, shared
        here = {param for group in groups for param in group["params"]}
        resting = {param: views for param, views in self.views.items() if param not in here}
        self.build(groups, state)
        for param, views in resting.items():  # let them hold no more memory than their own
            param.data = param.data.clone()
            for view in views.values():
                view.data = view.data.clone()

    def _is_phi_moved(self) -> bool:
        flats = [flats[0] for flats in self.flats if flats[0].shared]
        return any(flat.initialization and flat.is_phi_moved() for flat in flats)

    def _take_over_state_(self, given: Any) -> State:
        """The values of exchanged entries go into the buffers, and the entries show the buffers again."""
        if not isinstance(given, Mapping):
            raise ValueError(f"opt.state is {type(given).__name__}; it is a mapping of parameters to their state")
        state = given if isinstance(given, State) else State(given)
        every = state is not self.state or state.everything
        heads = (flat.segments for flats in self.flats for flat in flats if flat.shared)
        watched = [*self.views] if every else [p for p in state.seen if p in self.views]
        watched += [segment.params[0] for segments in heads for segment in segments]
        changes: list[tuple[Tensor, Tensor]] = []  # (view, its new value)
        moved: list[tuple[Tensor, str]] = []  # views whose memory was exchanged
        for param in dict.fromkeys(watched):
            flat, n, row = self.places[param]
            place, entry = flat.segments[n].where(row), state.entry(param)
            if not isinstance(entry, dict | None):
                raise ValueError(f"{place}: the entry {HERE} is {type(entry).__name__}; it is a dict of tensors")
            expected = flat.addresses(n, row)
            for name, view in self.views[param].items():
                value = (entry or {}).get(name)
                if view.data_ptr() != expected.get(name, view.data_ptr()):
                    refuse_shared(view, f"{place}: {name!r} {HERE}")
                    moved.append((param, name))
                if value is None:
                    if name == MOMENTUM:  # as in torch.optim.SGD, it starts anew
                        changes.append((view, torch.zeros_like(view)))
                        changes.append((self.views[param]["momentum_started"], torch.zeros((), dtype=torch.uint8)))
                elif value is not view or view.data_ptr() != expected.get(name, view.data_ptr()):
                    check_value(place, name, flat.like(n, name, view), value, HERE)
                    if name != "theta" or flat.master is not None:  # theta is what the parameter says
                        changes.append((view, value.detach().clone()))
        with torch.inference_mode(False), torch.no_grad():
            for param, name in moved:
                flat, n, row = self.places[param]
                self.views[param][name].data = flat.state(n, row)[name]
            for view, value in changes:
                view.copy_(value)
        for flat in chain.from_iterable(self.flats):
            flat.all_started = flat.all_started and not changes
        for param in watched:
            state.show(param, self.views[param])
        self._watch(state)
        state.seen.update(p for p in watched if _references(state.entry(p) or {}, self.views[p]) > UNSEEN)
        return state

    # The step ---------------------------------------------------------------------------------------------------------

    def collect(self, groups: Sequence[dict]) -> list[Gradients]:
        """The gradients of each device and dtype, after parameters whose storage was exchanged were taken back into the
        buffers.

        Raises ValueError naming task and parameter, before anything moved, for what the step cannot take.
        """
        collected = [collect() for collect in self.collectors]
        moved = [(collector, collector.moved) for collector in self.collectors if collector.moved]
        if moved and self._rebind_(moved, groups):
            return [collect() for collect in self.collectors]
        return collected

    def rebind_(self, groups: Sequence[dict]) -> None:
        """Take parameters whose storage was exchanged (`p.data = …`, deepcopy) back into the buffers; ValueError as in
        `collect`.
        """
        self._rebind_([(collector, collector.find_moved()) for collector in self.collectors], groups)
        for flat in chain.from_iterable(self.flats):
            flat.follow_parameters_()

    def _rebind_(self, moved: Sequence[tuple[Collector, list[int]]], groups: Sequence[dict]) -> bool:
        """Whether the buffers were laid out anew: so that memory which others hold, a backup of a parameter say, is not
        written.
        """
        places = [collector.places[i] for collector, found in moved for i in found]
        for flat, n, row in places:
            flat.check_param(flat.segments[n], row)
        if any(flat.is_held(n, row) or flat.is_laid_out_otherwise(n, row) for flat, n, row in places):
            self.build(groups, self.state)
            return True
        with torch.inference_mode(False), torch.no_grad():
            for flat, n, row in places:
                flat.adopt_(n, row, flat.segments[n].params[row])
        return False

    def begin_round_(self) -> None:
        """At the first step of a round θ is φ by definition: equal new values in all replicas are the new φ.

        Warns, naming task and parameter, of replicas that differ; they train from where they are, and φ stays.
        """
        with torch.no_grad():
            for flat in (flats[0] for flats in self.flats if flats[0].shared):
                flat.follow_parameters_()
                where = None if flat.is_at_phi() else flat.follow_replicas_()
                if where is not None:
                    self.differing = (
                        f"{where}: differs from the initialization at the start of a round and from the "
                        "other tasks, so φ stays; load the same weights into every task, or call reset_tasks()"
                    )

    def warn_of_differing_replicas(self) -> None:
        """Warn once of replicas that did not start at the initialization."""
        if self.differing is not None:
            message, self.differing = self.differing, None
            warnings.warn(message, stacklevel=5)

    def reset_(self, clear_momentum: bool) -> None:
        """θ_t ← φ for every t (and v_t ← 0)."""
        for backend, flat in self.shared:
            backend.reset_(clear_momentum)
            flat.note_write()

    @property
    def shared(self) -> list[tuple[Backend, Flat]]:
        """(backend, buffer) of the shared parameters of each device and dtype."""
        pairs = zip(self.backends, self.flats, strict=True)
        return [(backend, flats[0]) for backend, flats in pairs if flats[0].shared]

    def report_nonfinite(self) -> None:
        """Raise RuntimeError, naming task and parameter, if the last step met a gradient that was not finite; clears
        the flags.
        """
        if self.flags is None or (
            any(flags.is_cuda for flags in self.flags) and torch.cuda.is_current_stream_capturing()
        ):
            return
        for flags, collector in zip(self.flags, self.collectors, strict=True):
            for i in flags.nonzero().flatten().tolist():
                for seen in self.flags:
                    seen.zero_()
                flat, n, row = collector.places[i]
                raise RuntimeError(
                    f"{flat.segments[n].where(row)}: the gradient of the last step held a NaN or an infinity; "
                    "that step was applied"
                )

    # What is saved ----------------------------------------------------------------------------------------------------

    def saved_state(self, groups: Sequence[dict], given: Any) -> dict[Tensor, dict[str, Any]]:
        """Parameter → its entry, as references where that is the truth; what was exchanged is shown as it is, and
        nothing is written.
        """
        saved = {}
        for param in (param for group in groups for param in group["params"]):
            entry = given.entry(param) if isinstance(given, State) else given.get(param)
            saved[param] = entry = dict(entry or {})
            if param not in self.places:
                continue
            flat, n, row = self.places[param]
            aliases, views, expected = flat.state(n, row), self.views[param], flat.addresses(n, row)
            for name, view in views.items():
                value = entry.setdefault(name, view)
                if value is view and name in aliases and view.data_ptr() == expected.get(name, view.data_ptr()):
                    entry[name] = aliases[name]
            if not isinstance(entry[MOMENTUM], Tensor):  # somebody cleared it
                entry[MOMENTUM] = torch.zeros_like(views[MOMENTUM])
            entry["theta"] = self._saved_theta(param, entry["theta"])
        return saved

    def _saved_theta(self, param: Tensor, shown: Any) -> Tensor:
        """θ of a parameter in working precision: the parameter, or its master where that is its exact value."""
        flat, n, row = self.places[param]
        value = param.detach()
        if flat.master is None:
            is_alias = isinstance(shown, Tensor) and shown.data_ptr() == value.data_ptr() and shown.dtype == value.dtype
            return shown if is_alias else value.to(flat.work_dtype)
        if not isinstance(shown, Tensor) or shown.shape != value.shape:
            shown = self.views[param]["theta"]
        is_rounding = shown.to(flat.dtype) == value.to(flat.dtype)
        return shown if is_rounding.all() else torch.where(is_rounding, shown, value.to(shown.dtype))


def _same_objects(views: dict[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The views, as the objects that showed the same before, so that who holds one goes on to see what steps."""
    for name, view in views.items():
        before = old.get(name)
        if before is not None and before.shape == view.shape and before.dtype == view.dtype:
            before.data = view
            views[name] = before
    return views


def _references(entry: dict, views: Mapping[str, Tensor]) -> int:
    """References to an entry and to the most held of its tensors; φ and the counters are looked at before every step
    anyway.
    """
    tensors = (getrefcount(view) for name, view in views.items() if name not in ("initialization", "counters"))
    return getrefcount(entry) + max(tensors, default=0)


def _unseen() -> int:
    """What `_references` says of an entry that nobody else holds."""
    tensor = torch.zeros(())
    state, views = {0: {"theta": tensor}}, {0: {"theta": tensor}}
    del tensor
    return _references(dict.get(state, 0) or {}, views[0])


UNSEEN = _unseen()
