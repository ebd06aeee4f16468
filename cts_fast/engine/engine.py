"""The flat buffers under an optimizer's groups, and one truth about them: what users hold is what steps.

Between two steps a parameter's `.data`, the Parameters in `param_groups`, and `opt.state` may be exchanged from
outside. `sync_` and `collect` take over what was exchanged, or refuse it before anything moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import string_at
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cts_fast.engine.arguments import Regrouped, check_memory, regroup
from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Collector, Gradients, NonFiniteGradient, same_objects
from cts_fast.engine.layout import MOMENTUM, Flat, Segment, by_kind, make_flats, make_segments, refuse_shared
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.state import COUNTERS, UNSEEN, Scalars, State, check_value, kept_objects, references
from cts_fast.engine.step import counts_on_device, make_backend, resolve
from cts_fast.engine.writes import Writes

HERE = "in opt.state"


class Engine:
    """Buffers, backends and counters of one optimizer; laid out by `build`, stepped by `shifting_step_`.

    backend: the name that was asked for. flags_nonfinite: whether a step flags gradients that are not finite. own:
    further buffers of a method, name → "task" ([T, P]), "point" ([T, P], which begins at θ), "shared" ([P]) or "number"
    (one float64 a task); they are part of the state.
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
        self.phi_writes = Writes()
        with torch.inference_mode(False):
            self.counters = Scalars(torch.zeros(len(COUNTERS), dtype=torch.int64, device="cpu"))
        self.numbers: dict[str, Scalars] = {}
        self.hyper: list[Hyper] = []  # as last read, made from hyper_values
        self.hyper_values: list = []
        self.flags: list[Tensor] | None = None  # nonfinite="raise": one byte a gradient
        self.flags_on_host = False
        self.sent: tuple[list[Tensor], list] | None = None  # the last step's flags, and the events of their arrival
        self.unreported: NonFiniteGradient | None = None  # found in flags that a new layout has replaced
        self.counting = False  # whether the device takes a step's decisions
        self.segments: list[Segment] = []
        self.groups: list[tuple[dict, list, list, bool, list | None]] = []  # (group, params, sizes, shared, names)
        self.home: Any = None  # the parameter that the counters are kept with
        self.numbered: Sequence[Tensor] = ()  # those that a method's numbers are kept with
        self.state = State()
        self.differing: str | None = None  # where replicas differed from task 0 when they were laid out
        self.unchecked = False  # whether no step has looked for weights that were loaded since
        self.unfinished = False  # whether buffers are laid out that `state` does not show yet

    # Layout -----------------------------------------------------------------------------------------------------------

    def build(
        self,
        groups: Sequence[dict],
        state: State,
        inherited: Mapping[Tensor, Tensor] | None = None,
        aligns: bool = True,
    ) -> None:
        """Lay out flat buffers for all groups, fill them from `state` and the parameters, bind the parameters to them.

        inherited: a new parameter's φ. aligns: tasks of tensors that are new start at the first task's values. All that
        can fail comes before the first write; what others hold of older buffers stays as it is. Should an interrupt
        come in between, the old buffers go on, and the next step takes over what lies elsewhere.
        """
        with torch.inference_mode(False), torch.no_grad():
            segments = make_segments(groups)
            shared = [segment for segment in segments if segment.task is None]
            check_memory(segments)
            capturable, kinds = groups[0]["capturable"], by_kind(segments)
            names = [resolve(self.backend, device, dtype, capturable, len(groups)) for device, dtype in kinds]
            counting = capturable and counts_on_device(names)
            if counting and len({device for device, _ in kinds}) > 1:
                raise ValueError(
                    "capturable=True: one step's counters live on one device, but the parameters are on several"
                )
            flats = [make_flats(kind, counting, self.own) for kind in kinds.values()]
            collectors = [Collector(kind) for kind in flats]
            backends = [make_backend(name, kind) for name, kind in zip(names, flats, strict=True)]
            places = {
                param: (flat, n, row)
                for flat in chain.from_iterable(flats)
                for n, segment in enumerate(flat.segments)
                for row, param in enumerate(segment.params)
            }
            entries = {param: self._entry(state.entry(param), *place) for param, place in places.items()}
            home, numbered = segments[0].params[0], shared[0].params
            counters = self._counters(entries, state).to(home.device if capturable else "cpu")
            numbers = self._numbers(numbered, state)

            self.unreported = self.find_nonfinite()  # whose places are about to change
            state.everything = True
            phi = {**(inherited or {}), **{p: e["initialization"] for p, e in entries.items() if "initialization" in e}}
            differing = None
            for flat in chain.from_iterable(flats):
                differing = self._fill_(flat, entries, phi, aligns) or differing
            self.flats, self.names, self.backends, self.collectors = flats, names, backends, collectors
            self.counting, self.segments, self.places, self.home = counting, segments, places, home
            self.numbered, self.numbers, self.counters, self.differing = numbered, numbers, Scalars(counters), differing
            self.groups = [(g, list(g["params"]), list(g["sizes"]), g["shared"], _names(g)) for g in groups]
            self._show_(state)

    def _show_(self, state: State) -> None:
        """Let `state`, `initialization` and autograd know the buffers as they are laid out now; the end of `build`."""
        self.unchecked = self.unfinished = True
        views = {param: kept_objects(self.fresh_views(param), self.views.get(param, {})) for param in self.places}
        for param, own in views.items():
            state.show(param, own, ours=("initialization", "counters"))
        self.views = views
        self.initialization = {s.name: views[s.params[0]]["initialization"] for s in self.segments if s.task is None}
        for flat in chain.from_iterable(self.flats):
            if flat.shared:
                flat.initialization = [views[segment.params[0]]["initialization"] for segment in flat.segments]
            flat.note_written()
        self.phi_writes.follow(flat for _, flat in self.shared)
        if self.flags_nonfinite:
            self.flags = [
                torch.zeros(len(collector.params), dtype=torch.uint8, device=kind[0].device)
                for collector, kind in zip(self.collectors, self.flats, strict=True)
            ]
            self.flags_on_host, self.sent = not any(flags.is_cuda for flags in self.flags), None
        self._watch(state, self.places)
        self.unfinished = False

    def _entry(self, given: Any, flat: Flat, n: int, row: int) -> dict[str, Tensor]:
        """What an entry of `state` says of a parameter, checked; θ and φ of another shape are a predecessor's."""
        segment = flat.segments[n]
        if not isinstance(given, dict | None):
            raise ValueError(
                f"{segment.where(row)}: the entry {HERE} is {type(given).__name__}; it is a dict of tensors"
            )
        entry = {}
        for name in ("theta", MOMENTUM, "momentum_started", "initialization", *flat.own):
            value = (given or {}).get(name)
            is_predecessors = isinstance(value, Tensor) and name in ("theta", "initialization")
            if value is None or (is_predecessors and value.shape != segment.shape):
                continue
            check_value(segment.where(row), name, flat.like(n, name, flat.started[n, row]), value, HERE)
            entry[name] = value
        if MOMENTUM not in entry:  # it starts anew, so its next gradient is a first one
            entry.pop("momentum_started", None)
        return entry

    def _counters(self, entries: Mapping[Tensor, Mapping], state: State) -> Tensor:
        """The counters so far: this engine's, or before it has any those of `state`, which may be a checkpoint's."""
        if not self.flats:
            for param in entries:
                counters = (state.entry(param) or {}).get("counters")
                if isinstance(counters, Tensor):
                    return counters.clone()
        return self.counters.tensor

    def _numbers(self, params: Sequence[Tensor], state: State) -> dict[str, Scalars]:
        """A method's numbers, one a task, kept with each task's first shared parameter."""
        numbers = {}
        for name in (name for name, kind in self.own.items() if kind == "number"):
            values = [float((state.entry(param) or {}).get(name, 0.0)) for param in params]
            numbers[name] = Scalars(torch.tensor(values, dtype=torch.float64, device="cpu"))
        return numbers

    @staticmethod
    def _fill_(flat: Flat, entries: Mapping[Tensor, dict], phi: Mapping[Tensor, Tensor], aligns: bool) -> str | None:
        """Fill one flat buffer and bind its parameters; says where replicas that start together differed."""
        differing = None
        for n, segment in enumerate(flat.segments):
            start = segment.params[0].detach().clone()
            known = [param for param in segment.params if param in phi or "theta" in entries[param]]
            together = aligns and flat.shared and not known
            if flat.shared:
                found = next((phi[param] for param in segment.params if param in phi), start)
                flat.initialization[n].copy_(found)
            for row, param in enumerate(segment.params):
                if together and differing is None and not torch.equal(param.nan_to_num(), start.nan_to_num()):
                    differing = f"{segment.where(row)}: differs from task 0; every task starts at task 0's parameters"
                views = flat.state(n, row)
                for name, value in entries[param].items():  # a master of θ stays if the parameter is its rounding still
                    if name in views and name != "initialization":
                        views[name].copy_(value)
                flat.adopt_(n, row, start if together else param)
                for name in flat.points - entries[param].keys():
                    views[name].copy_(views["theta"])
        return differing

    def _watch(self, state: State, handed_out: Iterable[Tensor]) -> None:
        """From here on look only at entries that somebody will see, or holds of those that were handed out."""
        self.state, state.everything = state, False
        state.seen.clear()
        state.seen.update(p for p in handed_out if references(state.entry(p) or {}, self.views[p]) > UNSEEN)

    def forget_(self, params: Iterable[Tensor], groups: Sequence[dict], state: State) -> None:
        """Lay out the groups anew without these parameters, which were laid out and have left them."""
        for param in params:
            state.pop(param, None)
        self.build(groups, state)

    # One truth --------------------------------------------------------------------------------------------------------

    def sync_(self, groups: list[dict], state: Any) -> State:
        """Take over groups, Parameters and state that were exchanged since the last step; returns the state, always a
        `State`.

        Raises ValueError, before anything moved, for what cannot be taken over.
        """
        if self.unfinished:  # an interrupt came into the last layout
            with torch.inference_mode(False):
                self._show_(self.state)
        as_laid_out = self.is_as_laid_out(groups)
        exchanged = state is not self.state or state.everything or state.seen or not as_laid_out
        if exchanged or any(flat.is_phi_moved() for flats in self.flats for flat in flats[:1]):
            found = None if as_laid_out else regroup(groups, self.groups, self.num_tasks)
            state = self._take_over_state_(state, found)
            if found is not None:
                self._regroup_(groups, found, state)
        return state

    def is_as_laid_out(self, groups: list[dict]) -> bool:
        if len(groups) != len(self.groups):
            return False
        for group, (_, params, sizes, shared, _) in zip(groups, self.groups, strict=True):
            now = group.get("params") if isinstance(group, dict) else None
            if not isinstance(now, list) or not same_objects(now, params):
                return False
            if group.get("shared") is not shared or group.get("sizes") != sizes:
                return False
        return True

    def _regroup_(self, groups: list[dict], found: Regrouped, state: State) -> None:
        """Lay out anew what the groups hold now: parameters that went rest, and a new one takes its predecessor's
        place: φ goes on, momentum starts anew.
        """
        heirs = {new: self.views[old].get("initialization") for new, old in found.predecessors.items()}
        inherited = {new: phi for new, phi in heirs.items() if phi is not None and phi.shape == new.shape}
        resting = {param: self.views[param] for param in self.views if param not in found.params}
        self.build(found.as_groups(groups), state, inherited, aligns=False)
        found.write_(groups)
        self.groups = [(g, list(g["params"]), list(g["sizes"]), g["shared"], _names(g)) for g in groups]
        for param, views in resting.items():  # let them hold no more memory than their own
            param.data = param.data.clone()
            for view in views.values():
                view.data = view.data.clone()

    def fresh_views(self, param: Tensor) -> dict[str, Tensor]:
        """New views of all that belongs to a parameter."""
        flat, n, row = self.places[param]
        views = flat.state(n, row)
        if any(param is one for one in self.numbered):
            views |= {name: scalars.tensor[row] for name, scalars in self.numbers.items()}
        if param is self.home:
            views["counters"] = self.counters.tensor.detach()
        return views

    def addresses_of(self, param: Tensor) -> dict[str, int]:
        """Where the views lie as long as nobody exchanged their memory."""
        flat, n, row = self.places[param]
        addresses = flat.addresses(n, row)
        for name, scalars in self.numbers.items():
            addresses[name] = scalars.tensor.data_ptr() + 8 * row
        return {**addresses, "counters": self.counters.tensor.data_ptr()}

    def _take_over_state_(self, given: Any, found: Regrouped | None = None) -> State:
        """The values of exchanged entries go into the buffers, and the entries show the buffers again."""
        if not isinstance(given, Mapping):
            raise ValueError(f"opt.state is {type(given).__name__}; it is a mapping of parameters to their state")
        state = given if isinstance(given, State) else State(given)
        every = state is not self.state or state.everything
        watched = [*self.views] if every else [p for p in state.seen if p in self.views]
        watched += [segment.params[0] for _, flat in self.shared for segment in flat.segments]
        watched = [p for p in dict.fromkeys(watched) if found is None or p in found.params]
        changes: list[tuple[Tensor, Tensor]] = []  # (view, its new value)
        moved: list[tuple[Tensor, str]] = []  # views whose memory was exchanged
        for param in watched:
            self._compare(param, state.entry(param), changes, moved)
        with torch.inference_mode(False), torch.no_grad():
            for param, name in moved:
                self.views[param][name].data = self.fresh_views(param)[name]
            for view, value in changes:
                view.copy_(value)
            for views in () if self.counting else map(self.views.__getitem__, watched):
                if not views["momentum_started"] and views[MOMENTUM].any():  # given before a first gradient: it counts
                    views["momentum_started"].fill_(1)
        for flat in chain.from_iterable(self.flats):
            flat.all_started = False  # flags may have been written in place
        for param in watched:
            state.show(param, self.views[param])
        self._watch(state, watched)
        return state

    def _compare(self, param: Tensor, entry: Any, changes: list, moved: list) -> None:
        """Add what an entry holds in the place of its views to `changes`, views of other memory to `moved`."""
        flat, n, row = self.places[param]
        place, views, expected = flat.segments[n].where(row), self.views[param], self.addresses_of(param)
        if not isinstance(entry, dict | None):
            raise ValueError(f"{place}: the entry {HERE} is {type(entry).__name__}; it is a dict of tensors")
        for name, view in views.items():
            value, is_moved = (entry or {}).get(name), view.data_ptr() != expected.get(name, view.data_ptr())
            if is_moved:
                refuse_shared(view, f"{place}: {name!r} {HERE}")
                moved.append((param, name))
            if value is None and name == MOMENTUM:  # as in torch.optim.SGD, it starts anew
                changes.append((view, torch.zeros_like(view)))
                changes.append((views["momentum_started"], torch.zeros((), dtype=torch.uint8, device="cpu")))
            elif value is not None and (value is not view or is_moved):
                like = self.counters.tensor if name == "counters" else flat.like(n, name, view)
                check_value(place, name, like, value, HERE)
                if name != "theta" or flat.master is not None:  # θ is what the parameter says
                    changes.append((view, value.detach().clone()))

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
        if places:
            check_memory(self.segments)  # an exchange may tie what was apart
        if any(flat.is_held(n, row) or flat.is_laid_out_otherwise(n, row) for flat, n, row in places):
            self.build(groups, self.state)
            return True
        with torch.inference_mode(False), torch.no_grad():
            for flat, n, row in places:
                flat.adopt_(n, row, flat.segments[n].params[row])
        return False

    def check_loaded_weights_(self) -> None:
        """As `begin_round_` where the device counts: once after a layout or a load, and not in a capture."""
        if self.unchecked and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.unchecked = False
            if self.counters.read()[0] == 0:
                self.begin_round_()

    def begin_round_(self, before: Callable[[], None] | None = None) -> None:
        """At the first step of a round θ is φ by definition: equal new values in all replicas are the new φ, except
        where somebody wrote to φ itself: then both are what they hold.

        Warns, naming task and parameter, of replicas that differ; they train from where they are, and φ stays.
        before: is called before φ moves.
        """
        with torch.no_grad():
            for backend, flat in self.shared:
                flat.follow_parameters_()
                if backend.is_at_phi():
                    continue
                if before is not None:
                    before()
                if (where := flat.follow_replicas_(self.phi_writes.written())) is not None:
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
        self.note_phi()

    def book_(self, counters: Sequence[int]) -> None:
        """After a step: the counters, and in a new round which φ it begins with."""
        self.counters.write(counters)
        if counters[0] == 0:
            self.note_phi()

    def note_phi(self) -> None:
        """From here on a write to a view of φ is somebody else's."""
        self.phi_writes.note(flat for _, flat in self.shared)

    def handed_out(self) -> dict[str, Tensor]:
        """φ by name, for somebody who may write to it."""
        self.phi_writes.hand_out()
        return dict(self.initialization)

    @property
    def shared(self) -> list[tuple[Backend, Flat]]:
        """(backend, buffer) of the shared parameters of each device and dtype."""
        pairs = zip(self.backends, self.flats, strict=True)
        return [(backend, flats[0]) for backend, flats in pairs if flats[0].shared]

    @property
    def shared_groups(self) -> list[int]:
        """The groups that hold shared parameters, by their index."""
        return list(dict.fromkeys(segment.group for segment in self.segments if segment.task is None))

    def send_flags(self) -> None:
        """After a step on a GPU: its flags are on their way to the host, and nobody waits for them."""
        if self.flags is not None and not self.flags_on_host and not torch.cuda.is_current_stream_capturing():
            copies = [torch.empty(len(f), dtype=f.dtype, device="cpu", pin_memory=True) for f in self.flags]
            for copy, flags in zip(copies, self.flags, strict=True):
                copy.copy_(flags, non_blocking=True)
            arrived = [torch.cuda.Event() for _ in {flags.device for flags in self.flags}]
            for event, device in zip(arrived, {flags.device for flags in self.flags}, strict=True):
                event.record(torch.cuda.current_stream(device))
            self.sent = copies, arrived

    def report_nonfinite(self) -> None:
        """Raise NonFiniteGradient if the last step met a gradient that was not finite; clears the flags.

        Waits for a step on a GPU whose flags were sent, and not for what was queued after it.
        """
        if (found := self.find_nonfinite()) is not None:
            raise found

    def any_flagged(self) -> Tensor | None:
        """Whether a step since the last report met a gradient that was not finite: bool, not waited for."""
        if self.flags is None:
            return None
        device = self.flags[0].device
        if self.unreported is not None:
            return torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([one.any().to(device) for one in self.flags]).any()

    def find_nonfinite(self) -> NonFiniteGradient | None:
        """As `report_nonfinite`, but returned and not raised; None if there was none."""
        if self.unreported is not None:
            found, self.unreported = self.unreported, None
            return found
        if self.flags is None or not self.flags_on_host and torch.cuda.is_current_stream_capturing():
            return None
        copies, arrived = self.sent or ([flags.cpu() for flags in self.flags], [])
        self.sent = None
        for event in arrived:
            event.synchronize()
        for flags, collector in zip(copies, self.collectors, strict=True):
            i = string_at(flags.data_ptr(), flags.numel()).find(1)
            if i >= 0:
                for seen in self.flags:
                    seen.zero_()
                flat, n, row = collector.places[i]
                segment = flat.segments[n]
                return NonFiniteGradient(row if segment.task is None else segment.task, segment.name)
        return None

    def readable(self, groups: Sequence[dict]) -> list[dict]:
        """The groups with all that a layout needs, also where somebody edited them."""
        as_laid_out = self.is_as_laid_out(list(groups))
        return list(groups) if as_laid_out else regroup(groups, self.groups, self.num_tasks).as_groups(groups)

    def restored_state(self, groups: list[dict], given: Any) -> State:
        """A state that shows the buffers again, whatever was exchanged in it: for a load, which replaces all of it."""
        kept = given.items() if isinstance(given, Mapping) else ()
        state = State({param: entry for param, entry in kept if isinstance(entry, dict)})
        for param in self.places:
            with torch.inference_mode(False):
                fresh = self.fresh_views(param)
                for name, view in self.views[param].items():
                    view.data = fresh[name]
            state.show(param, self.views[param])
        self._watch(state, self.places)
        return self.sync_(groups, state)


def _names(group: Mapping) -> list[str] | None:
    names = group.get("param_names")
    return None if names is None else list(names)
