"""Whether a saved state dict fits an optimizer, told before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor

from cts_fast.engine.arguments import check_hyper, check_options


def matching(optimizer, state_dict: Mapping) -> tuple[list[dict], list[tuple[Tensor, Mapping]]]:
    """The saved param groups, and (parameter, its saved entry) for every parameter of `optimizer`.

    Raises ValueError, naming group or task and parameter, for another number of tasks or groups, other names, shapes or dtypes.
    """
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(
                f"{name!r} is missing in the loaded state dict; give what an optimizer's state_dict() returned"
            )
    saved_groups = deepcopy(state_dict["param_groups"])
    _check_groups(optimizer.param_groups, saved_groups)
    places = {
        param: segment.where(row) for segment in optimizer._segments() for row, param in enumerate(segment.params)
    }
    entries = []
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            entry = state_dict["state"].get(index, {})
            _check_entry(places[param], optimizer.state[param], entry)
            entries.append((param, entry))
    return saved_groups, entries


def _check_groups(groups: list[dict], saved_groups: list[dict]) -> None:
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has {len(saved_groups)} parameter groups, but the optimizer has {len(groups)}"
        )
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        sizes = saved.get("sizes", group["sizes"])
        if len(sizes) != len(group["sizes"]):
            raise ValueError(
                f"group {g}: loaded state dict has {len(sizes)} tasks, but the optimizer has {len(group['sizes'])}"
            )
        if saved.get("shared", group["shared"]) != group["shared"]:
            raise ValueError(
                f"group {g}: loaded state dict has shared={saved['shared']}, but the optimizer has shared={group['shared']}"
            )
        if sizes != group["sizes"] or len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {g}: loaded state dict has {sizes} parameters by task, but the optimizer has {group['sizes']}"
            )
        for mine, theirs in zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False):
            if mine != theirs:
                raise ValueError(f"group {g}, parameter {mine!r}: is named {theirs!r} in the loaded state dict")
        merged = {**group, **saved}
        check_hyper(merged)
        check_options(merged["horizon"], merged["meta_interval"])


def _check_entry(place: str, views: Mapping[str, Tensor], entry: Mapping) -> None:
    for name, view in views.items():
        value = entry.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{place}: {name!r} is missing in the loaded state dict")
        if value.shape != view.shape or value.dtype != view.dtype:
            raise ValueError(
                f"{place}: {name!r} is {value.dtype} {tuple(value.shape)} in the loaded state dict, but {view.dtype} {tuple(view.shape)} here"
            )
