"""An optimizer's state by task, so that other ranks than those that saved them can go on with its tasks.

A rank's `state_dict` numbers the parameters of its own tasks, and keeps what is not one task's beside its first one's.
Here they stand apart, as plain values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat, zip_longest
from typing import Any, NamedTuple

import torch

from cts_fast.distributed.agreement import RanksDiffer, Report
from cts_fast.distributed.ranks import together
from cts_fast.engine.layout import plain_name

INITIALIZATION, COUNTER_ENTRY = "initialization", "counters"  # names in the entries of a state dict
LAID_OUT = ("params", "param_names", "sizes")  # what a group says of this rank's tasks

Entries = list[dict[str, Any]]  # of a state dict, one for each parameter


class ByTask(NamedTuple):
    """The parts of a state; only groups that have parameters are in them, by their names.

    common: the same on every rank: options of the shared groups, counters, φ. tasks: of each task its own entries, and
    the options of its heads. sums: what a method has summed over these tasks in this round, laid out as φ.
    """

    common: dict[str, Any]
    tasks: list[dict[str, dict[str, Any]]]
    sums: dict[str, Entries]


class StateByTask:
    """An optimizer's state for `torch.distributed.checkpoint`, which any number of ranks can load again.

    Its keys name the tasks, not the ranks. dcp.save({"optimizer": StateByTask(optimizer, names)}, ...) stores each
    task's state once, and φ once; dcp.load() into such a dict, made by ranks that hold the same tasks in another way,
    or by one process, loads the same values. θ, momentum and φ are read in place; where a load breaks off or is
    refused, load again. Where a step broke off half-way, `reset_tasks()` on every rank comes before the load, which
    asks for the state first.

    optimizer: a `ShiftingMetaOptimizer` or another method. tasks: the names of this rank's tasks, in its order; no two
    tasks of all ranks share a name. Every rank makes it, saves and loads at the same time. Raises ValueError, over
    ranks on all of them, for names that are not as many as this rank's tasks, or not apart.
    """

    def __init__(self, optimizer: Any, tasks: Sequence[str]) -> None:
        self.optimizer, ranks = optimizer, optimizer.ranks
        with together(ranks, "StateByTask()") as report:
            self.tasks = [*tasks]
            report.tasks = optimizer.engine.num_tasks
            if len(self.tasks) != report.tasks or not all(isinstance(name, str) for name in self.tasks):
                raise ValueError(f"tasks: {self.tasks!r}; give a name to each of the {report.tasks} tasks here")
        found = [Report(found=self.tasks)] if ranks is None else ranks.gather(Report(found=self.tasks))
        names = Counter(chain.from_iterable(report.found for report in found))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise RanksDiffer(f"tasks: {twice} name several tasks; give each one, on all ranks, a name of its own")
        self.names = sorted(names)  # of all ranks

    def state_dict(self) -> dict[str, Any]:
        """Its parts, as references; a method's sums over this rank's tasks stand with the first of them.

        Raises as the optimizer's `state_dict`, over ranks on all of them.
        """
        with together(self.optimizer.ranks, "StateByTask.state_dict()") as report:
            report.tasks = len(self.tasks)
            common, tasks, sums = split(self.optimizer)
            parts = [sums, *(added([sums], count=False) for _ in tasks[1:])]  # a load writes into each of them
            kinds = ({"own": own, "sums": part} for own, part in zip(tasks, parts, strict=True))
            named = zip(self.tasks, kinds, _parameters(self.optimizer), strict=True)
            tasks_by_name = {name: {**kind, "parameters": found} for name, kind, found in named}
            return {"names": self.names, "common": common, "tasks": tasks_by_name}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where it was saved; raises as the optimizer's `load_state_dict`, ValueError for other tasks too."""
        with together(self.optimizer.ranks, "StateByTask.load_state_dict()") as report:
            report.tasks = len(self.tasks)
            if state_dict["names"] != self.names:
                raise ValueError(f"the state is of the tasks {state_dict['names']}, but the optimizer has {self.names}")
            tasks = [state_dict["tasks"][name] for name in self.tasks]
            for name, task, here in zip(self.tasks, tasks, _parameters(self.optimizer), strict=True):
                _check_parameters(name, task["parameters"], here)
            sums = added([task["sums"] for task in tasks])
            saved = ByTask(state_dict["common"], [task["own"] for task in tasks], sums)
            whole = joined(self.optimizer.state_dict(), saved)
        self.optimizer.load_state_dict(whole)


def split(optimizer: Any) -> ByTask:
    """The state of a `ShiftingMetaOptimizer`, or of another method, by task, as references."""
    state_dict = optimizer.state_dict()
    state = state_dict["state"]
    summed = [name for name, kind in optimizer.buffers.items() if kind == "shared"]  # a method's, over its tasks
    not_of_a_task = {INITIALIZATION, COUNTER_ENTRY, *summed}
    common: dict[str, Any] = {"groups": {}, INITIALIZATION: {}}
    common[COUNTER_ENTRY] = next(entry[COUNTER_ENTRY] for entry in state.values() if COUNTER_ENTRY in entry)
    tasks: list[dict] = []
    sums = {}
    for name, group in _named(state_dict["param_groups"]):
        tasks = tasks or [{} for _ in group["sizes"]]
        options = {option: value for option, value in group.items() if option not in LAID_OUT}
        for own, row in zip(tasks, _rows(group), strict=True):
            entries = [{kind: value for kind, value in state[i].items() if kind not in not_of_a_task} for i in row]
            if row:
                own[name] = {"entries": entries} if group["shared"] else {"entries": entries, "options": {**options}}
        if group["shared"] and group["params"]:
            firsts = [state[i] for i in next(_rows(group))]
            common["groups"][name] = options
            common[INITIALIZATION][name] = [entry[INITIALIZATION] for entry in firsts]
            if summed:
                sums[name] = [{kind: entry[kind] for kind in summed} for entry in firsts]
    return ByTask(common, tasks, sums)


def joined(own: Mapping[str, Any], saved: ByTask) -> dict[str, Any]:
    """The state dict that `saved` is for an optimizer of its tasks, whose present one is `own`.

    Raises ValueError or LookupError where it is of another one, ValueError where heads that are to share a group were
    saved with options that differ.
    """
    state, groups = {}, []
    for name, group in _named(own["param_groups"]):
        options = saved.common["groups"].get(name)
        for t, row in enumerate(_rows(group)):
            part: dict[str, Any] = saved.tasks[t][name] if row else {"entries": []}
            theirs = part.get("options", options)
            if row and options not in (None, theirs):
                raise ValueError(
                    f"{name}, task {t}: was saved with the options {theirs}, but a task before it with {options}; the "
                    "tasks of one rank share them"
                )
            options = theirs
            for n, (i, entry) in enumerate(zip(row, part["entries"], strict=True)):
                state[i] = {**entry}
                if group["shared"] and t == 0:
                    state[i][INITIALIZATION] = saved.common[INITIALIZATION][name][n]
                    state[i].update(saved.sums[name][n] if saved.sums else {})
                if COUNTER_ENTRY in own["state"][i]:
                    state[i][COUNTER_ENTRY] = saved.common[COUNTER_ENTRY]
        groups.append({**group, **(options or {})})
    return {"state": state, "param_groups": groups}


def added(parts: Sequence[dict[str, Entries]], count: bool = True) -> dict[str, Entries]:
    """The sums of several ranks as one rank's; 0 where it is not to `count` them, because another one does."""

    def total(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values).sum(0) if count else torch.zeros_like(values[0])

    return {
        name: [
            {kind: total([entry[kind] for entry in entries]) for kind in entries[0]}
            for entries in zip(*(part[name] for part in parts), strict=True)
        ]
        for name in parts[0]
    }


def _named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Groups by names that other ranks give them too, though their tasks may have no heads."""
    counts: Counter[str] = Counter()
    for group in groups:
        kind = "shared" if group["shared"] else "heads"
        yield f"{kind} {counts[kind]}", group
        counts[kind] += 1


def _parameters(optimizer: Any) -> list[list[tuple[str, ...]]]:
    """Of each task its parameters: (group, name if it was given one, dtype), what a load has to find again."""
    tasks: list[list[tuple[str, ...]]] = [[] for _ in range(optimizer.engine.num_tasks)]
    for kind, group in _named(optimizer.param_groups):
        params = zip(group.get("param_names") or repeat(""), group["params"], strict=False)
        for task, size in zip(tasks, group["sizes"], strict=True):
            task += [(kind, plain_name(name), str(param.dtype)) for name, param in islice(params, size)]
    return tasks


def _check_parameters(task: str, saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> None:
    """Raise ValueError, naming the task, for other parameters; names count where both sides have them."""
    for theirs, mine in zip_longest(saved, here, fillvalue=("", "", "")):
        if (*theirs[::2],) != (*mine[::2],) or (theirs[1] and mine[1] and theirs[1] != mine[1]):
            there, ours = (" ".join(filter(None, one)) or "none" for one in (theirs, mine))
            raise ValueError(f"task {task!r}: was saved with the parameter {there}, where the optimizer has {ours}")


def _rows(group: Mapping[str, Any]) -> Iterator[list[int]]:
    """The numbers of each task's parameters in a group."""
    indices = iter(group["params"])
    return (list(islice(indices, size)) for size in group["sizes"])
