"""What users may pass as tasks, brought into one form and checked: T lists of parameters, alike from task to task."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cts_fast.engine.backends.base import DTYPES
from cts_fast.engine.layout import Segment, is_without_memory, only_looks_dense, plain_name, refuse_shared
from cts_fast.engine.plan import OPTIONS
from cts_fast.engine.rules.sgd import Hyper, check_hyper

ALIKE = "shared parameters are the same in every task"


def check_needs(needs: frozenset[str], num_tasks: int, losses, heldout) -> None:
    """Raise ValueError where `step` is not given what a method needs."""
    for name, given in (("losses", losses), ("heldout", heldout)):
        if name in needs and given is None:
            raise ValueError(
                f"this method needs {name}: call step({name}=…) with one for each of the {num_tasks} tasks"
            )


def read_needs(num_tasks: int, losses, heldout) -> tuple[list, list]:
    """T losses, each a number or a tensor of one, and T functions that return held-out losses; none where they are not
    given. Raises ValueError or TypeError for what is something else.
    """
    losses, heldout = _one_a_task("losses", losses, num_tasks), _one_a_task("heldout", heldout, num_tasks)
    for t, loss in enumerate(losses):
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"task {t}: its loss has the shape {tuple(loss.shape)}; give one number for each task")
        if not hasattr(loss, "__float__"):
            raise TypeError(f"task {t}: its loss is {loss!r}; give a number or a tensor of one number")
    for t, function in enumerate(heldout):
        if not callable(function):
            raise ValueError(
                f"task {t}: its heldout is {function!r}; give a function that returns the held-out loss with its graph"
            )
    return losses, heldout


def _one_a_task(name: str, given, num_tasks: int) -> list:
    if given is None:
        return []
    if isinstance(given, Mapping):
        raise TypeError(f"{name} are a {type(given).__name__}; give a list with one for each task, in the tasks' order")
    try:
        items = iter(given)
    except TypeError:
        raise TypeError(f"{name} are {given!r}; give a list with one for each of the {num_tasks} tasks") from None
    result = list(items)
    if len(result) != num_tasks:
        raise ValueError(
            f"{name} of {len(result)} tasks given, but there are {num_tasks} tasks; give one for each task"
        )
    return result


def _is_parameter(item) -> bool:
    return isinstance(item, Tensor) or (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str))


def as_groups(tasks) -> Iterable:
    """The `tasks` argument as torch.optim.Optimizer takes it: param-group dicts. A bare tensor or set is left for torch
    to judge.
    """
    if isinstance(tasks, (Tensor, set)):
        return tasks
    _refuse_containers(tasks, "tasks")
    tasks = _as_list(tasks, "tasks")
    if not tasks or (isinstance(tasks[0], dict) and "params" in tasks[0]):
        return tasks
    return [{"params": tasks}]


def check_not_empty(groups: Sequence[Mapping]) -> None:
    """Raise ValueError where no task has a parameter, or none is shared."""
    if not any(group["params"] for group in groups):
        raise ValueError("optimizer got an empty parameter list: no task has a parameter")
    if not any(group["shared"] and group["params"] for group in groups):
        raise ValueError(
            "every group is a head group (shared=False) or empty; an initialization needs shared parameters"
        )


def plain_number(value: Any) -> Any:
    """A hyper-parameter as Python keeps it: numpy's scalars become Python's, so that checkpoints load with
    weights_only=True.
    """
    is_foreign = hasattr(value, "item") and not isinstance(value, Tensor) and getattr(value, "ndim", 0) == 0
    return value.item() if is_foreign else value


def _refuse_containers(item: Any, where: str) -> None:
    """Raise TypeError for a module or a state dict where parameters belong; a ParameterList is a list of them."""
    if isinstance(item, nn.Module) and not isinstance(item, nn.ParameterList):
        raise TypeError(f"{where}: is a module ({type(item).__name__}); give its parameters(), or named_parameters()")
    if isinstance(item, Mapping):
        raise TypeError(
            f"{where}: is a dict of {', '.join(map(repr, list(item)[:3]))}; optimizer can only optimize Tensors: "
            "give a module's named_parameters(), not its state_dict(), or a param group with 'params'"
        )


def _as_list(items: Any, where: str) -> list:
    """The items of an iterable; TypeError for what is none."""
    try:
        iterator = iter(items)
    except TypeError:
        reason = f"{where}: is {torch.typename(items)}; give an iterable of parameters, as net.parameters() is"
        raise TypeError(reason) from None
    return list(iterator)


def new_group(param_group: Any, defaults: Mapping, num_tasks: int | None) -> dict:
    """A group that a user gives, with a flat task-major list as "params" and their numbers by task as "sizes".

    Raises TypeError or ValueError, naming task, parameter and reason.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    of_groups = {*Hyper._fields, "shared"}
    for name in (
        *(name for name in defaults if name not in of_groups),
        "heads",
        "nonfinite",
        "process_group",
        "backend",
    ):
        if name in param_group:
            raise ValueError(f"{name} belongs to the whole optimizer and cannot be set for a group")
    check_hyper({**defaults, **param_group})
    shared = param_group.get("shared", True)
    tasks = drop_duplicates(split_tasks(param_group["params"], num_tasks))
    check_parameters(tasks, shared)
    if "param_names" in param_group and not any(isinstance(item, tuple) for task in tasks for item in task):
        tasks = _named(tasks, param_group["param_names"], shared)
    return {
        **{name: plain_number(value) for name, value in param_group.items()},
        "params": [item for task in tasks for item in task],
        "shared": shared,
        "sizes": [len(task) for task in tasks],
    }


def _named(tasks: list[list], names: Any, shared: bool) -> list[list]:
    """Tasks of (name, tensor) from a group's "param_names", as torch's param groups have them: a name for every tensor,
    or where tasks are alike for those of one task.

    Raises ValueError for what is no such list.
    """
    count = sum(map(len, tasks))
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"param_names are {names!r}; give a list with a name for each parameter, or named parameters")
    if shared and tasks and len(names) == len(tasks[0]):
        names = [*names] * len(tasks)
    if len(names) != count:
        raise ValueError(f"{len(names)} param_names given for {count} parameters; give one for each")
    of = iter(names)
    return [[(next(of), item) for item in task] for task in tasks]


def split_tasks(params, num_tasks: int | None) -> list[list]:
    """A group's `params` as one list of parameters a task.

    params: a tensor, an iterable of tensors or (name, tensor) (one task), or a list of T such iterables. num_tasks: T
    where it is known. Raises TypeError for unordered sets, ValueError for another number of tasks.
    """
    ordered = (
        "optimizer parameters need to be organized in ordered collections, "
        "but the ordering of tensors in sets will change between runs. "
    )
    if isinstance(params, set):
        raise TypeError(ordered + "Please use a list instead.")
    if not _is_parameter(params):
        _refuse_containers(params, "params")
    items = [params] if _is_parameter(params) else _as_list(params, "params")
    if not items:
        return [[] for _ in range(num_tasks or 0)]
    if _is_parameter(items[0]):
        tasks = [items]
    else:
        for t, item in enumerate(items):
            if isinstance(item, set):
                raise TypeError(f"task {t}: {ordered}Please use a list instead.")
            _refuse_containers(item, f"task {t}")
            if not isinstance(item, Iterable) or isinstance(item, str):
                raise TypeError(
                    f"task {t}: optimizer can only optimize Tensors, but one of the tasks is {torch.typename(item)}; "
                    "give an iterable of tensors for every task"
                )
        tasks = [list(item) for item in items]
    if num_tasks is not None and len(tasks) != num_tasks:
        raise ValueError(
            f"parameters of {len(tasks)} tasks given, but the optimizer has {num_tasks} tasks; give one iterable a task"
        )
    return tasks


def drop_duplicates(tasks: list[list]) -> list[list]:
    """Each task's parameters once, with torch's warning; ValueError where two tasks share one."""
    owner: dict[int, tuple[int, int]] = {}
    result, repeated = [], False
    for t, task in enumerate(tasks):
        kept = []
        for i, item in enumerate(task):
            tensor = item[1] if isinstance(item, tuple) else item
            where = owner.setdefault(id(tensor), (t, i))
            if where[0] != t:
                name = repr(item[0]) if isinstance(item, tuple) else str(i)
                raise ValueError(
                    f"task {t}, parameter {name}: is a parameter of task {where[0]} too; "
                    "every task needs replicas of its own"
                )
            if where[1] == i:
                kept.append(item)
            else:
                repeated = True
        result.append(kept)
    if repeated:
        warnings.warn(
            "optimizer contains a parameter group with duplicate parameters; in future, this will cause an error; "
            "see github.com/pytorch/pytorch/issues/40967 for more information",
            stacklevel=7,
        )
    return result


def check_parameters(tasks: list[list], shared: bool) -> None:
    """Raise TypeError or ValueError, naming task and parameter, for tensors that cannot be optimized or differ from
    task to task.
    """
    for t, task in enumerate(tasks):
        for i, item in enumerate(task):
            name, tensor = item if isinstance(item, tuple) else (str(i), item)
            _check_tensor(f"task {t}, parameter {name!r}", tensor)
    if shared and tasks:
        _check_alike(tasks)


def _check_tensor(where: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        _refuse_containers(tensor, where)
        raise TypeError(
            f"{where}: optimizer can only optimize Tensors, but one of the params is {torch.typename(tensor)}"
        )
    if is_lazy(tensor):
        raise ValueError(f"{where}: is not initialized yet; run a batch through the lazy module first")
    if only_looks_dense(tensor):
        raise ValueError(f"{where}: is a {type(tensor).__name__}; only plain dense tensors can be optimized")
    if tensor.is_inference():
        raise ValueError(f"{where}: was made under inference_mode, so nothing can train it; make it outside")
    if not tensor.is_leaf:
        raise ValueError(f"{where}: can't optimize a non-leaf Tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{where}: layout is {tensor.layout}; only strided tensors can be optimized")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where}: dtype is {tensor.dtype}; known: float32, float64, bfloat16, float16")
    if is_without_memory(tensor):
        raise ValueError(f"{where}: has no memory (a storage of size 0, or a tensor of zeros without one)")
    refuse_shared(tensor, where)


def _check_alike(tasks: list[list]) -> None:
    first = tasks[0]
    for t, task in enumerate(tasks[1:], 1):
        if len(task) != len(first):
            raise ValueError(f"task {t}: {len(task)} parameters, but task 0 has {len(first)}; {ALIKE}")
        for i, (item, model) in enumerate(zip(task, first, strict=True)):
            if isinstance(item, tuple) != isinstance(model, tuple):
                raise ValueError("all optimizer params should be with/without names. Some param names are missing")
            name, tensor = item if isinstance(item, tuple) else (str(i), item)
            model_name, model_tensor = model if isinstance(model, tuple) else (str(i), model)
            name, model_name = plain_name(name), plain_name(model_name)
            for what, mine, theirs in (
                ("name", name, model_name),
                ("shape", tuple(tensor.shape), tuple(model_tensor.shape)),
                ("dtype", tensor.dtype, model_tensor.dtype),
                ("device", tensor.device, model_tensor.device),
            ):
                if mine != theirs:
                    raise ValueError(f"task {t}, parameter {name!r}: {what} is {mine}, but {theirs} in task 0; {ALIKE}")


def check_memory(segments: Iterable[Segment]) -> None:
    """Raise ValueError, naming both, where two parameters, or numbers of one, lie in one place, or one in none; warn of
    views of something larger.

    The step gives every parameter memory of its own, so ties by storage alone would be cut.
    """
    spans: dict[int, list[tuple[int, int, Tensor, str]]] = {}
    for segment in segments:
        for row, param in enumerate(segment.params):
            if param.is_meta:
                raise ValueError(
                    f"{segment.where(row)}: is on the meta device, so it holds no numbers; to_empty() it on a device "
                    "and set its values before making the optimizer"
                )
            if param.numel() == 0:
                continue
            if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
                raise ValueError(f"{segment.where(row)}: several of its numbers lie in one place (an expanded tensor)")
            last = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            storage = param.untyped_storage()
            own = spans.setdefault(storage.data_ptr(), [])
            own.append((start, start + (last + 1) * param.itemsize, param, segment.where(row)))
    for own in spans.values():
        own.sort(key=lambda span: span[:2])
        for (_, end, before, here), (start, _, after, there) in zip(own, own[1:], strict=False):
            if start < end and _overlap(before, after):
                raise ValueError(f"{there}: lies in the memory of {here}; tie modules by sharing one Parameter instead")
        covered = sum(param.numel() * param.itemsize for _, _, param, _ in own)
        if covered < own[0][2].untyped_storage().nbytes():
            warnings.warn(
                f"{own[0][3]}: is a view of larger memory; the optimizer gives it memory of its own, "
                "so whoever holds the rest will not see it change",
                stacklevel=5,
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage share a number; their ranges do."""
    places = [
        torch.arange(t.untyped_storage().nbytes() // t.itemsize, device="cpu").as_strided(
            t.shape, t.stride(), t.storage_offset()
        )
        for t in (a, b)
    ]
    return a.itemsize != b.itemsize or bool(torch.isin(places[0].flatten(), places[1].flatten()).any())


def named_heads(heads: Iterable, num_tasks: int, named: bool) -> list[list]:
    """The `heads` argument as parameters of a group, with names where the other groups have them: torch wants all or
    none.
    """
    given = _as_list(heads, "heads")
    for t, head in enumerate(given):
        _refuse_containers(head, f"heads, task {t}")
    heads = [_as_list(head, f"heads, task {t}") for t, head in enumerate(given)]
    if len(heads) != num_tasks:
        raise ValueError(
            f"heads of {len(heads)} tasks given, but there are {num_tasks} tasks; give one iterable a task"
        )
    pairs = [
        [item if isinstance(item, tuple) else (f"head.{i}", item) for i, item in enumerate(head)] for head in heads
    ]
    return pairs if named else [[tensor for _, tensor in head] for head in pairs]


def refuse_copying(over_ranks: bool) -> None:
    """Raise RuntimeError for an optimizer that belongs to a process group, and where one is about to be sent to a
    process that is being spawned: its tensors would be shared.
    """
    if over_ranks:
        raise RuntimeError(
            "an optimizer with a process_group is neither copied nor pickled, since a group is not; "
            "make another one with a process_group and give it this one's state_dict()"
        )
    if get_spawning_popen() is not None:
        raise RuntimeError(
            "a ShiftingMetaOptimizer cannot be sent to another process: its parameters would move into shared memory, "
            "which the flat buffers cannot follow; make it in that process, and send state_dict() of clones"
        )


def read_group(group: dict, device: torch.device | None = None) -> Hyper:
    """A param group's hyper-parameters as numbers, checked. device: reads its own rates in a captured step, where the
    host takes no part: a tensor lr or meta_lr on it stays one.
    """
    group.update({name: plain_number(group[name]) for name in Hyper._fields})
    values = {name: group[name] for name in Hyper._fields}
    for name, value in values.items():
        if isinstance(value, Tensor) and not (name in ("lr", "meta_lr") and value.device == device):
            values[name] = value.item()
    check_hyper(values)
    return Hyper(**values)


def check_initialization(values: Any, initialization: Mapping[str, Tensor]) -> list[Tensor]:
    """New values of φ in its order, from a list or from a dict with at least its names.

    Raises ValueError, naming the parameter, for missing ones, other shapes and what holds no real numbers.
    """
    if not isinstance(values, Iterable) or isinstance(values, (Tensor, nn.Module)):
        raise ValueError(f"{type(values).__name__} given, but a list or a dict of tensors is needed")
    if isinstance(values, Mapping):
        missing = [name for name in initialization if name not in values]
        if missing:
            raise ValueError(f"parameter {missing[0]!r}: not in the given initialization")
        values = [values[name] for name in initialization]
    values = list(values)
    if len(values) != len(initialization):
        raise ValueError(f"{len(values)} tensors given, but the initialization has {len(initialization)}")
    for (name, phi), value in zip(initialization.items(), values, strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(f"parameter {name!r}: {type(value).__name__} given, but a tensor is needed")
        if value.shape != phi.shape or not value.is_floating_point() or value.layout != torch.strided:
            given = f"{value.dtype} {tuple(value.shape)}, {value.layout}"
            raise ValueError(
                f"parameter {name!r}: {given} given, but a dense real tensor of {tuple(phi.shape)} is needed"
            )
        if value.is_meta or only_looks_dense(value) or is_without_memory(value):
            raise ValueError(
                f"parameter {name!r}: a {type(value).__name__} on {value.device} that holds no numbers given"
            )
    return values


class Regrouped(NamedTuple):
    """What param_groups hold after an edit, read as groups of every task's parameters."""

    edits: list[dict]  # of each group: "sizes" by task, "shared", "param_names" where it has names
    options: dict  # the whole optimizer's
    predecessors: dict[Tensor, Tensor]  # new Parameter → the one whose place it took
    params: set[Tensor]  # all that the groups hold

    def as_groups(self, groups: Sequence[dict]) -> list[dict]:
        """The groups as they are to be laid out; the user's own stay as they are."""
        return [{**group, **edit, **self.options} for group, edit in zip(groups, self.edits, strict=True)]

    def write_(self, groups: Sequence[dict]) -> None:
        """Complete the user's groups."""
        for group, edit in zip(groups, self.edits, strict=True):
            group.update({**edit, **self.options})


Known = tuple[dict, list, list, bool, "list | None"]  # a group as laid out: itself, its params, sizes, shared, names


def regroup(groups: Sequence[dict], known: Sequence[Known], num_tasks: int) -> Regrouped:
    """Read param_groups that were edited from outside; known: the groups as they were laid out.

    Raises ValueError, naming the group, for what cannot be read as a task-major list of every task's parameters.
    """
    owner = {id(param): before for before in known for param in before[1]}
    name_of = {id(param): name for before in known for param, name in zip(before[1], before[4] or (), strict=False)}
    result = Regrouped([], {}, {}, set())
    for g, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(f"group {g}: is no dict with a list of 'params'; add groups with add_param_group()")
        for name in (*Hyper._fields, *OPTIONS):
            if name not in group:
                raise ValueError(f"group {g}: {name!r} is missing; add groups with add_param_group()")
        params = group["params"]
        unknown: Known = ({}, [], [], True, None)
        before = next((owner[id(param)] for param in params if id(param) in owner), unknown)
        sizes, shared = group.get("sizes", before[2]), bool(group.get("shared", before[3]))
        if len(sizes) != num_tasks or sum(sizes) != len(params):
            raise ValueError(
                f"group {g}: holds {len(params)} parameters, but {sizes} by task were laid out; a task-major list "
                "cannot be cut or grown in place: remove the whole group, or add one with add_param_group()"
            )
        if len({*map(id, params), *map(id, result.params)}) < len(params) + len(result.params):
            raise ValueError(f"group {g}: a parameter stands twice in param_groups")
        tensors = iter(params)
        check_parameters([[next(tensors) for _ in range(size)] for size in sizes], shared)
        result.params.update(params)
        edit = {"sizes": list(sizes), "shared": shared}
        names = group.get("param_names")
        if names is not None:  # a name goes where its parameter goes
            edit["param_names"] = [name_of.get(id(p), name) for p, name in zip(params, names, strict=True)]
        if len(before[1]) == len(params):
            here = set(map(id, params))
            pairs = zip(params, before[1], strict=True)
            result.predecessors.update((new, old) for new, old in pairs if id(new) not in owner and id(old) not in here)
        result.edits.append(edit)
    if not any(edit["shared"] and group["params"] for edit, group in zip(result.edits, groups, strict=True)):
        raise ValueError("no group with shared parameters is left in param_groups: there is nothing to meta-learn")
    first = known[0][0]  # the optimizer's options are read there; they outlast that group
    source = groups[0] if any(group is first for group in groups) or "horizon" not in first else first
    result.options.update({name: source[name] for name in OPTIONS})
    return result
