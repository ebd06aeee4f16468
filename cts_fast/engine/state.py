"""What is saved: the counters as a tensor, `opt.state` as a mapping that notices, and whether a state dict fits."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from cts_fast.engine.layout import Segment, is_without_memory, plain_name
from cts_fast.engine.plan import check_options
from cts_fast.engine.rules.sgd import check_hyper

COUNTERS = ("inner_step", "round", "meta_updates", "skipped_steps")  # in their order in the tensor "counters"
_TYPES = {torch.int64: ctypes.c_int64, torch.float64: ctypes.c_double}


class Scalars:
    """A few numbers in `tensor` [n], int64 or float64, on whatever device needs them, read and written together.

    In host memory they are plain numbers in a few cycles; torch's ops on a handful would take a tenth of a small
    network's step.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.on_host = tensor.device.type == "cpu"
        self._numbers: Any = None
        self._address = 0

    def read(self) -> list:
        """All of them; waits for the device."""
        return self._in_memory()[:] if self.on_host else self.tensor.tolist()

    def write(self, values: Sequence) -> None:
        """Set all of them."""
        if self.on_host:
            self._in_memory()[:] = values
        else:
            self.tensor.copy_(torch.tensor(values, dtype=self.tensor.dtype, device="cpu"))

    def _in_memory(self) -> ctypes.Array:
        address = self.tensor.data_ptr()
        if address != self._address:
            self._numbers = (_TYPES[self.tensor.dtype] * len(self.tensor)).from_address(address)
            self._address = address
        return self._numbers


class State(defaultdict):
    """`opt.state`: a defaultdict(dict) that notes whose entries somebody has seen, so that only those are looked at
    before a step.

    seen: the parameters whose entries were handed out since the buffers were laid out; everything: all of them were.
    `entry` is the engine's own access, which notes nothing.
    """

    def __init__(self, *entries: Any) -> None:
        """As a defaultdict(dict), whose first argument may be given or left out."""
        if entries and not isinstance(entries[0], Mapping):
            entries = entries[1:]
        super().__init__(dict, *entries)
        self.seen: set = set()
        self.everything = True

    def entry(self, param: Tensor) -> Any:
        """The entry of a parameter, or None."""
        return dict.get(self, param)

    def show(self, param: Tensor, views: Mapping[str, Any], ours: Iterable[str] = ()) -> None:
        """Let the entry of a parameter hold these tensors, and none else of the names `ours`; what users keep in it
        stays.
        """
        entry = self.entry(param)
        if not isinstance(entry, dict):
            self.put(param, entry := {})
        for name in ours:
            entry.pop(name, None)
        entry.update(views)

    def put(self, param: Tensor, entry: dict) -> None:
        """Enter what belongs to a parameter."""
        dict.__setitem__(self, param, entry)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value) -> None:
        self.seen.add(key)
        super().__setitem__(key, value)

    def __delitem__(self, key) -> None:
        self.seen.add(key)
        super().__delitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __iter__(self):  # what dict(state) asks too
        self.everything = True
        return super().__iter__()

    def __reduce__(self):
        return defaultdict, (dict, dict(self))

    def copy(self) -> Any:
        """A plain defaultdict(dict) of the same entries."""
        return defaultdict(dict, dict(self))

    __copy__ = copy

    def __or__(self, other):
        return defaultdict(dict, {**self, **other})

    def __ror__(self, other):
        return {**other, **self}


def _noting(name: str):
    method = getattr(defaultdict, name)

    def noting(self, *args, **kwargs):
        self.everything = True
        return method(self, *args, **kwargs)

    noting.__name__, noting.__doc__ = name, method.__doc__
    return noting


for _name in ("clear", "items", "pop", "popitem", "setdefault", "update", "values", "__ior__"):
    setattr(State, _name, _noting(_name))


def kept_objects(views: dict[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The views, as the objects that showed the same before, so that who holds one goes on to see what steps."""
    for name, view in views.items():
        before = old.get(name)
        if before is not None and before.shape == view.shape and before.dtype == view.dtype:
            before.data = view
            views[name] = before
    return views


def references(entry: dict, views: Mapping[str, Tensor]) -> int:
    """References to an entry and to the most held of its tensors; φ and the counters are looked at before every step
    anyway.
    """
    tensors = (getrefcount(view) for name, view in views.items() if name not in ("initialization", "counters"))
    return getrefcount(entry) + max(tensors, default=0)


def _unseen() -> int:
    """What `references` says of an entry that nobody else holds."""
    tensor = torch.zeros(())
    state, views = {0: {"theta": tensor}}, {0: {"theta": tensor}}
    del tensor
    return references(dict.get(state, 0) or {}, views[0])


UNSEEN = _unseen()


def check_state_dict(
    groups: Sequence[dict], segments: Iterable[Segment], views: Mapping[Tensor, Mapping[str, Tensor]], state_dict: Any
) -> tuple[list[dict], list[tuple[Tensor, Mapping[str, Tensor]]]]:
    """The saved param groups, and (parameter, its saved entry) for every parameter, of a state dict that fits.

    Raises ValueError, naming group or task and parameter, for what no state_dict() returned, another number of tasks or
    groups, other names, shapes or dtypes, and counters that are none.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state dict is a mapping, but {type(state_dict).__name__} was given")
    for name, kind in (("state", Mapping), ("param_groups", Sequence)):
        if name not in state_dict:
            raise ValueError(
                f"{name!r} is missing in the loaded state dict; give what an optimizer's state_dict() returned"
            )
        if not isinstance(state_dict[name], kind):
            raise ValueError(f"{name!r} is {type(state_dict[name]).__name__} in the loaded state dict")
    saved_groups = deepcopy(list(state_dict["param_groups"]))
    _check_groups(groups, saved_groups)
    places = {param: segment.where(row) for segment in segments for row, param in enumerate(segment.params)}
    entries = []
    for group, saved_group in zip(groups, saved_groups, strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            entry = state_dict["state"].get(index, {})
            check_entry(places[param], views[param], entry)
            entries.append((param, entry))
    return saved_groups, entries


def _check_groups(groups: Sequence[dict], saved_groups: Sequence) -> None:
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has {len(saved_groups)} parameter groups, but the optimizer has {len(groups)}"
        )
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), Sequence):
            raise ValueError(f"group {g}: the loaded state dict has no list of parameters there")
        sizes = saved.get("sizes", group["sizes"])
        if not isinstance(sizes, Sequence):
            raise ValueError(f"group {g}: 'sizes' is {type(sizes).__name__} in the loaded state dict")
        if len(sizes) != len(group["sizes"]):
            raise ValueError(
                f"group {g}: loaded state dict has {len(sizes)} tasks, but the optimizer has {len(group['sizes'])}"
            )
        if saved.get("shared", group["shared"]) is not group["shared"]:
            raise ValueError(
                f"group {g}: loaded state dict has shared={saved['shared']}, "
                f"but the optimizer has shared={group['shared']}"
            )
        if list(sizes) != group["sizes"] or len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {g}: loaded state dict has {sizes} parameters by task, but the optimizer has {group['sizes']}"
            )
        names = saved.get("param_names", ())
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"group {g}: 'param_names' are no list of names in the loaded state dict")
        for mine, theirs in zip(group.get("param_names", ()), names, strict=False):
            if plain_name(mine) != plain_name(theirs):
                raise ValueError(f"group {g}, parameter {mine!r}: is named {theirs!r} in the loaded state dict")
        merged = {**group, **saved}
        check_hyper(merged)
        check_options(merged)


def check_entry(place: str, views: Mapping[str, Tensor], entry: Any, where: str = "in the loaded state dict") -> None:
    """Raise ValueError, naming the place, where an entry lacks a tensor of `views`, or has one of another shape or
    dtype.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: the entry is {type(entry).__name__} {where}; it is a dict of tensors")
    for name, view in views.items():
        if name not in entry:
            raise ValueError(f"{place}: {name!r} is missing {where}")
        check_value(place, name, view, entry[name], where)


def check_value(place: str, name: str, view: Tensor, value: Any, where: str) -> None:
    """Raise ValueError, naming the place, for what cannot stand in a view's place."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{place}: {name!r} is {type(value).__name__} {where}; it is a tensor")
    if value.shape != view.shape or value.dtype != view.dtype or value.layout != torch.strided:
        raise ValueError(
            f"{place}: {name!r} is {value.dtype} {tuple(value.shape)} {where}, "
            f"but {view.dtype} {tuple(view.shape)} here"
        )
    if value.device.type == "meta" and view.device.type != "meta":
        raise ValueError(f"{place}: {name!r} is on the meta device {where}, so it holds no numbers")
    if is_without_memory(value):
        raise ValueError(f"{place}: {name!r} has no memory {where}; its storage was freed")
    if name == "counters" and value.lt(0).any():
        raise ValueError(f"{place}: 'counters' are {value.tolist()} {where}; they count {', '.join(COUNTERS)} from 0")
