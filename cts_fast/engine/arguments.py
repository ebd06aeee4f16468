"""What users may pass as tasks, brought into one form and checked: T lists of parameters, alike from task to task."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NON_NEGATIVE = {  # name → the wording torch.optim.SGD users know
    "lr": "learning rate", "momentum": "momentum value", "weight_decay": "weight_decay value", "meta_lr": "meta learning rate",
}  # fmt: skip
PER_GROUP = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "meta_lr", "shift")


def check_hyper(values: dict) -> None:
    """Raise ValueError, naming the option, for hyper-parameters that no step can use."""
    for name in ("lr", "meta_lr"):
        if isinstance(values[name], Tensor) and values[name].numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    for name in ("lr", "momentum", "dampening", "weight_decay", "meta_lr", "shift"):
        value = values[name]
        if isinstance(value, Tensor):
            if not value.is_cpu:
                continue  # reading it would wait for the device
            value = value.item()
        if not isinstance(value, Real) or not math.isfinite(value) or (name in NON_NEGATIVE and value < 0):
            raise ValueError(f"Invalid {NON_NEGATIVE.get(name, name)}: {value}")
    if values["nesterov"] and (values["momentum"] <= 0 or values["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_options(horizon, meta_interval) -> None:
    """Raise ValueError for options of the whole optimizer that no step can use."""
    if horizon is not None and (not isinstance(horizon, Integral) or horizon < 1):
        raise ValueError(f"Invalid horizon: {horizon}; it is a number of steps ≥ 1, or None for no resets")
    if not isinstance(meta_interval, Integral) or meta_interval < 1:
        raise ValueError(f"Invalid meta_interval: {meta_interval}; it is a number of steps ≥ 1")


def check_needs(needs: frozenset[str], num_tasks: int, losses, heldout) -> None:
    """Raise ValueError or TypeError where `step` is not given what a method needs: T losses, or T callables that return held-out losses."""
    for name, given in (("losses", losses), ("heldout", heldout)):
        if name in needs and given is None:
            raise ValueError(
                f"this method needs {name}: call step({name}=…) with one for each of the {num_tasks} tasks"
            )
        if given is not None and len(given) != num_tasks:
            raise ValueError(
                f"{name} of {len(given)} tasks given, but there are {num_tasks} tasks; give one for each task"
            )
    for t, loss in enumerate(losses or ()):
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"task {t}: its loss has the shape {tuple(loss.shape)}; give one number for each task")
        if not hasattr(loss, "__float__"):
            raise TypeError(f"task {t}: its loss is {loss!r}; give a number or a tensor of one number")
    for t, function in enumerate(heldout or ()):
        if not callable(function):
            raise ValueError(
                f"task {t}: its heldout is {function!r}; give a function that returns the held-out loss with its graph"
            )


def _is_parameter(item) -> bool:
    return isinstance(item, Tensor) or (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str))


def as_groups(tasks) -> Iterable:
    """The `tasks` argument as torch.optim.Optimizer takes it: param-group dicts. A bare tensor or set is left for torch to judge."""
    if isinstance(tasks, (Tensor, set)):
        return tasks
    tasks = list(tasks)
    if not tasks or isinstance(tasks[0], dict):
        return tasks
    return [{"params": tasks}]


def split_tasks(params, num_tasks: int | None) -> list[list]:
    """A group's `params` as one list of parameters a task.

    params: a tensor, an iterable of tensors or (name, tensor) (one task), or a list of T such iterables. num_tasks: T where it is known.
    Raises TypeError for unordered sets, ValueError for another number of tasks.
    """
    ordered = "optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets will change between runs. "
    if isinstance(params, set):
        raise TypeError(ordered + "Please use a list instead.")
    items = [params] if _is_parameter(params) else list(params)
    if not items:
        return [[] for _ in range(num_tasks or 0)]
    if _is_parameter(items[0]):
        tasks = [items]
    else:
        for t, item in enumerate(items):
            if isinstance(item, set):
                raise TypeError(f"task {t}: {ordered}Please use a list instead.")
            if not isinstance(item, Iterable) or isinstance(item, (dict, str)):
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
                    f"task {t}, parameter {name}: is a parameter of task {where[0]} too; every task needs replicas of its own"
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
            stacklevel=5,
        )
    return result


def check_parameters(tasks: list[list], shared: bool) -> None:
    """Raise TypeError or ValueError, naming task and parameter, for tensors that cannot be optimized or do not match from task to task."""
    for t, task in enumerate(tasks):
        for i, item in enumerate(task):
            name, tensor = item if isinstance(item, tuple) else (str(i), item)
            where = f"task {t}, parameter {name!r}"
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{where}: optimizer can only optimize Tensors, but one of the params is {torch.typename(tensor)}"
                )
            if not tensor.is_leaf:
                raise ValueError(f"{where}: can't optimize a non-leaf Tensor")
            if tensor.layout != torch.strided:
                raise ValueError(f"{where}: layout is {tensor.layout}; only strided tensors can be optimized")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{where}: dtype is {tensor.dtype}; known: float32, float64, bfloat16, float16")
    if not shared or not tasks:
        return
    first = tasks[0]
    for t, task in enumerate(tasks[1:], 1):
        if len(task) != len(first):
            raise ValueError(
                f"task {t}: {len(task)} parameters, but task 0 has {len(first)}; shared parameters are the same in every task"
            )
        for i, (item, model) in enumerate(zip(task, first, strict=True)):
            if isinstance(item, tuple) != isinstance(model, tuple):
                raise ValueError("all optimizer params should be with/without names. Some param names are missing")
            name, tensor = item if isinstance(item, tuple) else (str(i), item)
            model_name, model_tensor = model if isinstance(model, tuple) else (str(i), model)
            for what, mine, theirs in (
                ("name", name, model_name),
                ("shape", tuple(tensor.shape), tuple(model_tensor.shape)),
                ("dtype", tensor.dtype, model_tensor.dtype),
                ("device", tensor.device, model_tensor.device),
            ):
                if mine != theirs:
                    raise ValueError(
                        f"task {t}, parameter {name!r}: {what} is {mine}, but {theirs} in task 0; shared parameters are the same in every task"
                    )
