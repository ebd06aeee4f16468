"""What the ranks of tests/distributed run: each check gets a process group and returns numbers to compare."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from support.nets import backward, make_nets, make_optimizer
from support.step_cases import Case, parameters, result, set_gradients
from torch import Tensor

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS
from cts_fast.distributed import StateByTask, agreement


def own_tasks(layout: tuple[int, ...], rank: int) -> slice:
    """The tasks of a rank, where rank r has layout[r] of them."""
    ends = [0, *accumulate(layout)]
    return slice(ends[rank], ends[rank + 1])


def make(group, case: Case, layout, backend="reference", cls=ShiftingMetaOptimizer, **more):
    """(optimizer of this rank's tasks, parameters of all tasks)."""
    shared, heads = parameters(case)
    own = slice(None) if group is None else own_tasks(layout, dist.get_rank(group))
    given = heads[own] if case.heads else None
    options = {**case.options, **more}
    opt = cls(shared[own], **options, heads=given, backend=backend, process_group=group)
    return opt, [a + b for a, b in zip(shared, heads, strict=True)]


def phi_of(opt) -> Tensor:
    return torch.cat([phi.flatten() for phi in opt.initialization])


def trajectory(group, case: Case, layout, backend="reference", cls=ShiftingMetaOptimizer, **more):
    """φ after every step [steps, P], and then all that this rank's buffers hold."""
    opt, params = make(group, case, layout, backend, cls, **more)
    assert opt.num_tasks == case.tasks
    phis = []
    own = slice(0, None) if group is None else own_tasks(layout, dist.get_rank(group))
    for step in range(case.steps):
        set_gradients(case, params[own], step, own.start)
        opt.step(**_losses(opt, layout, group, step))
        phis.append(phi_of(opt).clone())
    return torch.stack(phis), result(opt), (opt.inner_step, opt.round, opt.meta_updates, opt.skipped_steps)


def _losses(opt, layout, group, step):
    if "losses" not in opt.needs:
        return {}
    tasks = range(sum(layout))[slice(None) if group is None else own_tasks(layout, dist.get_rank(group))]
    return {"losses": [1.0 / (1 + t + step) for t in tasks]}


def raised(call, *given) -> str:
    """What a call raises, in words; "" if nothing."""
    try:
        call(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def everything(opt) -> list[Tensor]:
    return [*(tensor.clone() for tensor in result(opt)), torch.tensor(opt.engine.counters.read())]


# How ranks and one process compare --------------------------------------------------------------------------------


def worst_ulps_of_single_steps(group, case: Case, layout, backend) -> float:
    """Every step from the state of one process with all tasks: how far φ and θ end from it, in ulps of the largest of
    |φ| and |θ_t| that a coordinate has before and after the step.
    """
    opt, params = make(group, case, layout, backend)
    twin, twins = make(None, case, layout, backend)
    own, worst = own_tasks(layout, dist.get_rank(group)), 0.0
    for step in range(case.steps):
        for mine, theirs in zip(params[own], twins[own], strict=True):
            for p, q in zip(mine, theirs, strict=True):
                p.data.copy_(q)
                opt.state[p]["momentum_buffer"].copy_(twin.state[q]["momentum_buffer"])
        for phi, other in zip(opt.initialization, twin.initialization, strict=True):
            phi.copy_(other)
        set_gradients(case, params, step)
        set_gradients(case, twins, step)
        scales = [_largest(twin, twins, i) for i in range(len(case.shapes))]
        opt.step()
        twin.step()
        for i, scale in enumerate(scales):
            scale = torch.maximum(scale, _largest(twin, twins, i))
            ulp = torch.nextafter(scale, torch.full_like(scale, float("inf"))) - scale
            pairs = [(opt.initialization[i], twin.initialization[i])]
            pairs += [
                (mine[i].detach(), theirs[i].detach()) for mine, theirs in zip(params[own], twins[own], strict=True)
            ]
            worst = max(worst, *(((a - b).abs() / ulp).max().item() for a, b in pairs))
    return worst


def _largest(opt, params, i: int) -> Tensor:
    """The largest of |φ| and |θ_t| at each coordinate of one tensor."""
    return torch.stack([opt.initialization[i], *(task[i].detach() for task in params)]).abs().amax(0)


def nets_trajectory(group, layout, backend="auto") -> list[Tensor]:
    """φ after 20 steps of real networks in float64, and their losses' gradients with it."""
    nets = make_nets(sum(layout), torch.float64)
    own = slice(0, None) if group is None else own_tasks(layout, dist.get_rank(group))
    opt = make_optimizer(nets[own], backend=backend, process_group=group)
    for step in range(20):
        opt.zero_grad()
        backward(nets[own], step, first=own.start)
        opt.step()
    return [phi.clone() for phi in opt.initialization]


def collectives(group, case: Case, layout, backend="auto") -> list[list[int]]:
    """Of each step, how many numbers its all-reduces carry."""
    opt, params = make(group, case, layout, backend)
    found = []
    for step in range(case.steps):
        set_gradients(case, params, step)
        with torch.profiler.profile(record_shapes=True) as profile:
            opt.step()
        events = [event for event in profile.events() if event.name.startswith("gloo:") and event.input_shapes]
        assert all(event.name == "gloo:all_reduce" for event in events)
        found.append([event.input_shapes[0][0] for event in events])
    return found


def steps_without_company(group, case: Case, layout) -> int:
    """Two steps that need no company: rank 0 takes them before rank 1 begins."""
    opt, params = make(group, case, layout)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(case, params, step)
            opt.step()

    if dist.get_rank(group) == 0:
        steps(0, 2)
    dist.barrier(group)
    steps(2 if dist.get_rank(group) == 0 else 0, 3)
    return opt.meta_updates


# Faults -----------------------------------------------------------------------------------------------------------


def disagreements(group, case: Case, changes: list[dict]) -> list[str]:
    """What the construction raises where the last rank differs by each of these."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    layout, found = (1,) * dist.get_world_size(group), []
    for change in changes:
        change = dict(change) if last else {}
        version = change.pop("version", agreement.__version__)
        shared, _ = parameters(replace(case, **change.pop("case", {})))
        name = change.pop("name", "weight")
        tasks = [[(f"{name}.{i}", p) for i, p in enumerate(task)] for task in shared[own_tasks(layout, 0)]]
        agreement.__version__, kept = version, agreement.__version__
        cls = METHODS[change.pop("cls", "cts")]
        found.append(raised(lambda tasks=tasks, change=change, cls=cls: cls(tasks, process_group=group, **change)))
        agreement.__version__ = kept
    return found


def refusals(group, methods: list[str]) -> list[str]:
    net = [torch.nn.Parameter(torch.ones(2))]
    found = [raised(lambda name=name: METHODS[name](net, process_group=group)) for name in methods]
    found.append(raised(lambda: ShiftingMetaOptimizer(net, process_group=group, capturable=True)))
    opt = ShiftingMetaOptimizer(net, process_group=group)
    found += [raised(copy.deepcopy, opt), raised(pickle.dumps, opt)]
    return found


def step_with(group, case: Case, layout, fault, backend="auto", nonfinite="ignore") -> tuple:
    """Two good steps, one in which fault(opt, params of the last rank) was done there, and one more.

    What these two raise, and whether each changed anything; the counters at the end.
    """
    opt, params = make(group, case, layout, backend, nonfinite=nonfinite)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    found = []
    for step in range(4):
        set_gradients(case, params, step)
        if step == 2 and last:
            fault(opt, params[own_tasks(layout, len(layout) - 1)])
        before = everything(opt)
        error = raised(opt.step)
        same = all(a.equal(b) for a, b in zip(before[:-1], everything(opt)[:-1], strict=True))
        found.append((error, same))
    return found[2:], opt.engine.counters.read(), phi_of(opt)


def put_nan(opt, params) -> None:
    params[0][1].grad[0] = float("nan")


def put_sparse(opt, params) -> None:
    params[0][0].grad = params[0][0].detach().to_sparse()


def other_lr(opt, params) -> None:
    opt.param_groups[0]["lr"] = 0.25


def other_phi(opt, params) -> None:
    opt.initialization[0].view(-1)[0] += 1


def bad_horizon(opt, params) -> None:
    opt.param_groups[0]["horizon"] = 0


def no_gradients(opt, params) -> None:
    opt.zero_grad()


def reset_alone(opt, params) -> None:
    opt.reset_tasks()


def faults_in_turn(group, case: Case, layout) -> tuple[list[str], list[int]]:
    """What one rank causes on all, one fault after the other, with good steps of all in between; the counters."""
    opt, params = make(group, case, layout, "auto", nonfinite="skip")
    last, found = dist.get_rank(group) == len(layout) - 1, []
    for step, fault in enumerate((put_nan, put_sparse, None, other_group, put_sparse, None)):
        set_gradients(case, params, step)
        if fault is other_group:
            found.append(raised(other_group, opt, -1.0 if last else 0.1))
            continue
        if fault is not None and last:
            fault(opt, params[own_tasks(layout, len(layout) - 1)])
        found.append(raised(opt.step))
    return found, opt.engine.counters.read()


def other_group(opt, lr: float) -> None:
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})


def closure_that_raises(group, case: Case, layout) -> list[str]:
    """As a step whose closure raises on the last rank; then one more step of all."""
    opt, params = make(group, case, layout)
    set_gradients(case, params, 0)

    def closure():
        if dist.get_rank(group) == len(layout) - 1:
            raise KeyError("a batch")

    return [raised(opt.step, closure), raised(opt.step)]


def scaled_step(group, case: Case, layout) -> tuple[bool, bool]:
    """Whether a step with a GradScaler changes anything: with an infinity on the last rank alone, and without."""
    opt, params = make(group, case, layout)
    own, changed = params[own_tasks(layout, dist.get_rank(group))], []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_gradients(case, params, step)
        if step == 0 and dist.get_rank(group) == len(layout) - 1:
            own[0][0].grad.view(-1)[0] = float("inf")
        before = everything(opt)
        scaler.step(opt)
        scaler.update()
        changed.append(not all(a.equal(b) for a, b in zip(before, everything(opt), strict=True)))
    return changed[0], changed[1]


# Life of an optimizer ---------------------------------------------------------------------------------------------


def starts(group) -> tuple[list[float], list[float], str]:
    """φ and θ of an optimizer whose ranks bring other values, and the first step's warning."""
    net = [torch.nn.Parameter(torch.full((2,), 1.0 + dist.get_rank(group)))]
    opt = ShiftingMetaOptimizer(net, process_group=group)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt.step()
    return phi_of(opt).tolist(), net[0].tolist(), " ".join(str(one.message) for one in found)


def added_group(group) -> tuple[list[str], list[float], int]:
    """Group after group: one that one rank refuses, one that differs, a good one; what they raise, and φ."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    opt = ShiftingMetaOptimizer([torch.nn.Parameter(torch.ones(2))], process_group=group)
    new = torch.nn.Parameter(torch.full((1,), 2.0 + dist.get_rank(group)))
    errors = [raised(opt.add_param_group, {"params": [new], "lr": -1.0 if last else 0.1})]
    errors += [raised(opt.add_param_group, {"params": [new], "lr": 0.2 if last else 0.1})]
    assert len(opt.state) == len(opt.param_groups) == 1
    errors += [raised(opt.add_param_group, {"params": [new], "lr": 0.1})]
    for group_ in opt.param_groups:
        for param in group_["params"]:
            param.grad = torch.ones_like(param)
    opt.step()
    return errors, phi_of(opt).tolist(), len(opt.param_groups)


def steps_of(opt, case: Case, params, first: int, last: int, start: int = 0) -> None:
    """Steps `first` to `last` of tasks `start` and on."""
    for step in range(first, last):
        set_gradients(case, params, step, start)
        given = {"losses": [1.0 / (1 + start + t + step) for t in range(len(params))]} if "losses" in opt.needs else {}
        opt.step(**given)


def checkpointed(group, case: Case, layout, folder: str, save: bool, cls=ShiftingMetaOptimizer) -> tuple:
    """Five steps, saved by torch.distributed.checkpoint, or loaded from there by an optimizer that began elsewhere, and
    four more: (what each task had then, φ, counters), before those four and after them.
    """
    import torch.distributed.checkpoint as dcp  # slow to import

    rank = 0 if group is None else dist.get_rank(group)
    own = own_tasks(layout, rank)
    opt, params = make(group, case if save else replace(case, seed=case.seed + 1), layout, "auto", cls)
    names = [f"task.{t}" for t in range(case.tasks)[own]]
    if save:
        steps_of(opt, case, params[own], 0, 5, own.start)
        dcp.save({"optimizer": StateByTask(opt, names)}, checkpoint_id=folder, process_group=group)
    else:
        dcp.load({"optimizer": StateByTask(opt, names)}, checkpoint_id=folder, process_group=group)
    found = [_by_task(opt, params[own])]
    steps_of(opt, case, params[own], 5, 9, own.start)
    return *found, _by_task(opt, params[own])


def _by_task(opt, params) -> tuple:
    kept = ["theta", "momentum_buffer", *(name for name, kind in opt.buffers.items() if kind == "task")]
    tasks = [[opt.state[p][name].clone() for p in task for name in kept if name in opt.state[p]] for task in params]
    return tasks, phi_of(opt).clone(), (opt.inner_step, opt.round, opt.meta_updates)


def names_of_tasks(group, names) -> str:
    """What a state by task raises for these names of each rank's tasks."""
    opt = ShiftingMetaOptimizer([torch.nn.Parameter(torch.ones(2))], process_group=group)
    error = raised(StateByTask, opt, names[dist.get_rank(group)])
    opt.state_dict()
    return error


def state_of_torn_ranks(group, folder: str) -> tuple[str, bool]:
    """(what asking for the state by task raises where rank 1 broke a step off, whether a load after a reset gives what
    was saved).
    """
    import torch.distributed.checkpoint as dcp  # slow to import

    case = Case(2, options={"lr": 0.1, "momentum": 0.9})
    opt, params = make(group, case, (1, 1))
    rank = dist.get_rank(group)
    named = {"optimizer": StateByTask(opt, [str(rank)])}
    steps_of(opt, case, params[rank : rank + 1], 0, 3, rank)
    dcp.save(named, checkpoint_id=folder, process_group=group)
    known = everything(opt)
    steps_of(opt, case, params[rank : rank + 1], 3, 4, rank)
    if rank == 1:
        opt.ranks.moves()
    error = raised(named["optimizer"].state_dict)
    opt.reset_tasks()
    dcp.load(named, checkpoint_id=folder, process_group=group)
    return error, all(a.equal(b) for a, b in zip(everything(opt), known, strict=True))


def refused_loads(group, case: Case, layout) -> list[tuple[str, bool]]:
    """State dicts that one rank cannot load, and that do not belong together; whether something changed."""
    opt, params = make(group, case, layout)
    set_gradients(case, params, 0)
    before_step = opt.state_dict()
    early = copy.deepcopy(before_step)
    opt.step()
    good, last = copy.deepcopy(opt.state_dict()), dist.get_rank(group) == len(layout) - 1
    bad = {**good, "param_groups": []}
    found = []
    for wrong in (bad, early):
        before = everything(opt)
        error = raised(opt.load_state_dict, wrong if last else good)
        found.append((error, not all(a.equal(b) for a, b in zip(before, everything(opt), strict=True))))
    return found


def loaded_initialization(group, case: Case, layout) -> list[str]:
    """What the next step raises after the same values were loaded everywhere, and after others on the last rank."""
    opt, params = make(group, case, layout)
    last, found = dist.get_rank(group) == len(layout) - 1, []
    for own in (0.0, float(last)):
        opt.load_initialization([torch.full_like(phi, own) for phi in opt.initialization])
        set_gradients(case, params, 0)
        found.append(raised(opt.step))
    return found
