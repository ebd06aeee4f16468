"""An optimizer's state by task, so that other ranks than those that saved them can go on with its tasks.

A rank's `state_dict` numbers the parameters of its own tasks, and keeps what is not one task's beside its first one's.
Here they stand apart, as plain values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

PHI, COUNTERS = "initialization", "counters"  # names in the entries of a state dict
LAID_OUT = ("params", "param_names", "sizes")  # what a group says of this rank's tasks


class ByTask(NamedTuple):
    """common: the same on every rank: options of the groups, counters, φ. tasks: of each task its own, a list of
    entries for each group. sums: what a method has summed over these tasks in this round, laid out as φ.
    """

    common: dict[str, Any]
    tasks: list[list[list[dict[str, Any]]]]
    sums: list[list[dict[str, Any]]]


def split(state_dict: Mapping[str, Any], summed: Collection[str]) -> ByTask:
    """The state dict of an optimizer by task, as references. summed: names of a method's sums over its tasks."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    apart = {PHI, COUNTERS, *summed}
    tasks: list = [[] for _ in groups[0]["sizes"]]
    common: dict[str, Any] = {"groups": [], PHI: [], COUNTERS: None}
    sums = []
    for group in groups:
        rows = list(_rows(group))
        for own, row in zip(tasks, rows, strict=True):
            own.append([{name: value for name, value in state[i].items() if name not in apart} for i in row])
        firsts = [state[i] for i in rows[0]] if group["shared"] else []
        common["groups"].append({name: value for name, value in group.items() if name not in LAID_OUT})
        common[PHI].append([entry[PHI] for entry in firsts])
        sums.append([{name: entry[name] for name in summed} for entry in firsts])
    common[COUNTERS] = next(entry[COUNTERS] for entry in state.values() if COUNTERS in entry)
    return ByTask(common, tasks, sums)


def joined(own: Mapping[str, Any], saved: ByTask) -> dict[str, Any]:
    """The state dict that `saved` is for an optimizer of its tasks, whose present one is `own`.

    Raises ValueError or LookupError where it is of another one.
    """
    state, groups = {}, []
    for g, group in enumerate(own["param_groups"]):
        for t, row in enumerate(_rows(group)):
            for n, (i, entry) in enumerate(zip(row, saved.tasks[t][g], strict=True)):
                state[i] = dict(entry)
                if group["shared"] and t == 0:
                    state[i] |= {PHI: saved.common[PHI][g][n], **saved.sums[g][n]}
                if COUNTERS in own["state"][i]:
                    state[i][COUNTERS] = saved.common[COUNTERS]
        groups.append({**group, **saved.common["groups"][g]})
    return {"state": state, "param_groups": groups}


def added(parts: Sequence[list[list[dict[str, Any]]]], count: bool) -> list[list[dict[str, Any]]]:
    """The sums of several ranks as one rank's; 0 where it is not to `count` them, because another one does."""
    return [
        [
            {
                name: torch.stack([e[name] for e in entries]).sum(0) if count else torch.zeros_like(entries[0][name])
                for name in entries[0]
            }
            for entries in zip(*groups, strict=True)
        ]
        for groups in zip(*parts, strict=True)
    ]


def _rows(group: Mapping[str, Any]) -> Iterator[list[int]]:
    """The numbers of each task's parameters in a group."""
    indices = iter(group["params"])
    return (list(islice(indices, size)) for size in group["sizes"])
