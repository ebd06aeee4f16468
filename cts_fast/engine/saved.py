"""What state dicts and copies say: what parameters, groups and `opt.state` hold now; nothing is written.
`load_` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cts_fast.engine.arguments import plain_number, regroup
from cts_fast.engine.layout import MOMENTUM, Segment, make_segments
from cts_fast.engine.state import State

if TYPE_CHECKING:
    from cts_fast.engine.engine import Engine


def saved_state(engine: Engine, groups: Sequence[dict], given: Any) -> dict[Tensor, dict[str, Any]]:
    """Parameter → its entry, as references where that is the truth; what was exchanged is shown as it is, and
    nothing is written.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"opt.state is {type(given).__name__}; it is a mapping of parameters to their state")
    saved, phi = {}, {}
    for param in (param for group in groups for param in group["params"]):
        entry = given.entry(param) if isinstance(given, State) else given.get(param)
        if not isinstance(entry, dict | None):
            raise ValueError(f"opt.state: an entry is {type(entry).__name__}; it is a dict of tensors")
        saved[param] = entry = dict(entry or {})
        if param in engine.places:
            _save(engine, param, entry)
        if "initialization" in entry:
            phi[param] = entry.pop("initialization")
        entry.pop("counters", None)
    segments = engine.segments if engine.is_as_laid_out(list(groups)) else _save_new(engine, groups, saved, phi)
    for segment in segments:
        if segment.task is None:
            found = next((phi[param] for param in segment.params if param in phi), None)
            default = segment.params[0].detach()
            saved[segment.params[0]]["initialization"] = default if found is None else found
    shown = given.entry(engine.home) if isinstance(given, State) else given.get(engine.home)
    counters = (shown or {}).get("counters", engine.counters.tensor)
    saved[segments[0].params[0]]["counters"] = counters.detach()
    return saved


def packed(groups: Sequence[dict], state: Mapping) -> dict:
    """Groups and state as torch.optim.Optimizer.state_dict packs them, hyper-parameters as plain numbers."""
    optimizer: Any = SimpleNamespace(
        param_groups=groups,
        state=state,
        _optimizer_state_dict_pre_hooks={},
        _optimizer_state_dict_post_hooks={},
    )
    state_dict = torch.optim.Optimizer.state_dict(optimizer)
    for group in state_dict["param_groups"]:
        group.update({name: plain_number(value) for name, value in group.items()})
    return state_dict


def with_clones(entry: Mapping[str, Any], views: Mapping[str, Tensor]) -> dict[str, Any]:
    """A saved entry with tensors of its own in the place of `views`."""
    return {**entry, **{name: entry[name].detach().clone() for name in views}}


def load_(
    engine: Engine,
    groups: Sequence[dict],
    saved_groups: Sequence[dict],
    saved: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
) -> None:
    """Write what `check_state_dict` returned into the buffers, the state and the groups; no entry is one of them."""
    for param, entry in saved:
        views = engine.views[param]
        for name, view in views.items():
            view.copy_(entry[name])
        engine.state.show(param, {name: value for name, value in entry.items() if name not in views})
    engine.unchecked = True
    for flat in chain.from_iterable(engine.flats):
        flat.all_started = False
        if flat.master is not None:
            flat.theta.copy_(flat.master)
        flat.note_write()
    engine.note_phi()
    for group, saved_group in zip(groups, saved_groups, strict=True):
        kept = ("params", "param_names", "capturable", "shared", "sizes")
        group.update({name: plain_number(value) for name, value in saved_group.items() if name not in kept})


def _save(engine: Engine, param: Tensor, entry: dict[str, Any]) -> None:
    """Complete an entry that is to be saved: aliases of the views, and what was exchanged as it is."""
    aliases, views, expected = engine.fresh_views(param), engine.views[param], engine.addresses_of(param)
    if entry.get(MOMENTUM) is None:  # somebody cleared it: the next step starts it anew
        entry[MOMENTUM] = torch.zeros_like(views[MOMENTUM])
        entry["momentum_started"] = torch.zeros_like(views["momentum_started"])
    for name, view in views.items():
        value = entry.setdefault(name, view)
        if value is view and view.data_ptr() == expected.get(name, view.data_ptr()):
            entry[name] = aliases[name]
    entry["theta"] = _saved_theta(engine, param, entry["theta"])


def _save_new(engine: Engine, groups: Sequence[dict], saved: dict, phi: dict) -> list[Segment]:
    """The segments of groups that were edited since; entries of new parameters as the next step would make them."""
    found = regroup(groups, engine.groups, engine.num_tasks)
    segments = make_segments(found.as_groups(groups))
    for new, old in found.predecessors.items():
        views = engine.views[old]
        if "initialization" in views and views["initialization"].shape == new.shape and new not in phi:
            phi[new] = views["initialization"]
    for param in (param for segment in segments for param in segment.params if param not in engine.places):
        entry, value = saved[param], param.detach()
        entry.setdefault("theta", value if value.dtype == torch.float64 else value.float())
        entry.setdefault(MOMENTUM, torch.zeros_like(value))
        entry.setdefault("momentum_started", torch.zeros((), dtype=torch.uint8, device="cpu"))
    return segments


def _saved_theta(engine: Engine, param: Tensor, shown: Any) -> Tensor:
    """θ of a parameter in working precision: the parameter, or its master where that is its exact value."""
    flat, n, row = engine.places[param]
    value = param.detach()
    if flat.master is None:
        is_alias = isinstance(shown, Tensor) and shown.data_ptr() == value.data_ptr() and shown.dtype == value.dtype
        return shown if is_alias else value.to(flat.work_dtype)
    if not isinstance(shown, Tensor) or shown.shape != value.shape:
        shown = engine.views[param]["theta"]
    is_rounding = shown.to(flat.dtype) == value.to(flat.dtype)
    return shown if is_rounding.all() else torch.where(is_rounding, shown, value.to(shown.dtype))
