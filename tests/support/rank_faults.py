"""What the ranks of tests/distributed/test_rank_faults.py run: faults of one rank, and what becomes of all."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from support.rank_checks import METHODS, make, own_tasks, phi_of, raised
from support.step_cases import Case, set_gradients
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cts_fast import ShiftingMetaOptimizer


def is_last(group) -> bool:
    return dist.get_rank(group) == dist.get_world_size(group) - 1


class Breaks(ShiftingMetaOptimizer):
    """A method whose step raises at its end, where it is told to."""

    now = False

    def apply_(self, step) -> None:
        super().apply_(step)
        if self.now:
            raise KeyError("a method")


class Run:
    """One optimizer and the gradients of its tasks: those of this rank, or, without a group, all."""

    def __init__(self, group, case: Case, layout, cls=ShiftingMetaOptimizer, **more) -> None:
        self.own = slice(0, None) if group is None else own_tasks(layout, dist.get_rank(group))
        self.case, self.group = case, group
        self.opt, params = make(group, case, layout, "auto", cls, **more)
        self.params = params[self.own]

    def step(self, number: int, fault: bool = False) -> str:
        """A step with that one's gradients; fault: sparse ones. What it raises."""
        set_gradients(self.case, self.params, number, self.own.start)
        if fault:
            self.params[0][0].grad = self.params[0][0].detach().to_sparse()
        losses = {} if "losses" not in self.opt.needs else {"losses": [1.0 + number] * len(self.params)}
        return raised(lambda: self.opt.step(**losses))


def mend(opt, how: str, checkpoint: dict, phi: list[Tensor]) -> None:
    """Bring the ranks together again."""
    if how == "load_state_dict":
        opt.load_state_dict(checkpoint)
    elif how == "load_initialization":
        opt.load_initialization(phi)
    else:
        opt.reset_tasks()


def torn_and_mended(group, case: Case, layout, at: int, how: str) -> tuple[list[str], Tensor, list[int]]:
    """A step that fails on the last rank, what is refused then, and what comes after it is mended: what was raised, φ,
    counters. Without a group nothing fails.
    """
    run = Run(group, case, layout)
    opt, found = run.opt, []
    for number in range(at):
        found.append(run.step(number))
    checkpoint, phi = copy.deepcopy(opt.state_dict()), [phi.clone() for phi in opt.initialization]
    if group is not None:
        found += [run.step(at, fault=is_last(group)), run.step(at), raised(opt.state_dict)]
        found += [raised(opt.add_param_group, {"params": [torch.nn.Parameter(torch.ones(1))]})]
    mend(opt, how, checkpoint, phi)
    for number in range(at, case.steps):
        found.append(run.step(number))
    return found, phi_of(opt), opt.engine.counters.read()


def broken_at_the_end(group, case: Case, layout) -> tuple[list[str], list[str], Tensor]:
    """The last rank raises when its step has moved everything but the counters: what all raise from there on, and after
    a new round and a load; φ at the end.
    """
    run = Run(group, case, layout, Breaks)
    run.step(0)
    checkpoint = copy.deepcopy(run.opt.state_dict())
    run.opt.now = is_last(group)
    found = [run.step(1)]
    run.opt.now = False
    found += [run.step(2), run.step(3)]
    run.opt.load_state_dict(checkpoint)
    return found, [run.step(number) for number in range(1, case.steps)], phi_of(run.opt)


def with_collectives_in_between(group, case: Case, layout, method: str) -> list[str]:
    """A training loop that averages its loss on the optimizer's own group after every step, which the closure of the
    last rank ends once with an error.
    """
    run, found = Run(group, case, layout, METHODS[method]), []
    for number in range(case.steps):
        set_gradients(case, run.params, number)

        def closure(number=number):
            if number == 1 and is_last(group):
                raise KeyError("a batch")

        found.append(raised(run.opt.step, closure))
        loss = torch.ones(1)
        dist.all_reduce(loss, group=group)
        assert loss == dist.get_world_size(group)
    return found


def other_layouts(group, edit: str, all_of_them: bool, interval: int = 1) -> list[str]:
    """What two steps raise after the parameters of the last rank, or of all, were exchanged."""
    first, second = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [first]}, {"params": [second]}]
    opt = ShiftingMetaOptimizer(groups, lr=0.1, meta_lr=0.3, meta_interval=interval, process_group=group)
    found = []
    for step in range(3):
        if step == 1 and (all_of_them or is_last(group)):
            if edit == "strides":
                first.data = first.data.t().contiguous().t()
            elif edit == "group":
                del opt.param_groups[1]
            else:
                opt.param_groups[1]["params"][0] = second = torch.nn.Parameter(torch.ones(5))
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        found.append(raised(opt.step))
    return found[1:]


def other_calls(group, case: Case, layout) -> str:
    """What ranks raise of which the last loads while the others step."""
    run = Run(group, case, layout)
    run.step(0)
    if is_last(group):
        return raised(run.opt.load_state_dict, run.opt.state_dict())
    return run.step(1)


def loaded_weights(
    group, case: Case, layout, changes: dict[int, float], method="cts"
) -> tuple[list[Tensor], list[str]]:
    """φ after every step of a run in which, at the start of its second round, `changes` were added to the weights of
    some tasks; what it warned of.
    """
    run = Run(group, case, layout, METHODS[method])
    phis = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for number in range(case.steps):
            if number == case.options["horizon"]:
                for task, params in enumerate(run.params, run.own.start):
                    for param in params:
                        param.data.add_(changes.get(task, 0.0))
            error = run.step(number)
            assert not error, error
            phis.append(phi_of(run.opt).clone())
    return phis, [str(one.message) for one in found]


def nan_and_a_new_group(group, case: Case, layout) -> list[str]:
    """A gradient of the last rank is NaN in a step that talks to nobody, and then all add a group."""
    run = Run(group, case, layout, nonfinite="raise")
    set_gradients(case, run.params, 0, run.own.start)
    if is_last(group):
        run.params[0][0].grad.fill_(float("nan"))
    found = [raised(run.opt.step)]
    more = [[torch.nn.Parameter(torch.ones(2, dtype=case.dtype))] for _ in run.params]
    run.opt.add_param_group({"params": more})
    return found + [run.step(number) for number in range(1, case.steps)]


def hook_that_raises(group, case: Case, layout, everywhere: bool) -> list[str]:
    """What a step raises whose pre-hook fails on the last rank, and then a good one."""
    run = Run(group, case, layout, nonfinite="skip")

    def hook(*_):
        if is_last(group):
            raise KeyError("a hook")

    register = register_optimizer_step_pre_hook if everywhere else run.opt.register_step_pre_hook
    handle = register(hook)
    found = [run.step(0)]
    handle.remove()
    return [*found, run.step(0)]


def refused_options(group, method: str, options: dict) -> str:
    """What the construction raises where the last rank's options are these."""
    net = [torch.nn.Parameter(torch.ones(2))]
    return raised(lambda: METHODS[method](net, process_group=group, **(options if is_last(group) else {})))


def scaler_on_one_rank(group, case: Case, layout, method: str) -> list[str]:
    """What the steps of a round raise where the last rank alone has a GradScaler."""
    run, found = Run(group, case, layout, METHODS[method]), []
    for number in range(case.options["horizon"]):
        if is_last(group):
            run.opt.grad_scale, run.opt.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        found.append(run.step(number))
        if found[-1]:
            break
    return found


def scaler_on_and_off(group, case: Case, layout) -> tuple[list[str], Tensor]:
    """Steps with a GradScaler and without, in turn; φ."""
    run, found = Run(group, case, layout), []
    for number in range(case.steps):
        if number % 3:
            run.opt.grad_scale, run.opt.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        found.append(run.step(number))
        for name in ("grad_scale", "found_inf"):
            run.opt.__dict__.pop(name, None)
    return found, phi_of(run.opt)


def other_measure(group, case: Case, layout) -> list[str]:
    """What a load raises that brings the last rank another measure of Leap's, and a step after it was set there."""
    run = Run(group, case, layout, METHODS["leap"])
    saved = run.opt.state_dict()
    if is_last(group):
        saved["param_groups"][0]["measure"] = "energy"
    found = [raised(run.opt.load_state_dict, saved)]
    if is_last(group):
        run.opt.param_groups[0]["measure"] = "energy"
    return found + [run.step(number) for number in range(case.options["horizon"])]


def heads_first(group) -> tuple[str, int]:
    """The construction and a step where rank 0 alone has a head, in a group before the shared ones, of the dtype of the
    second of them.
    """
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    head = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))] * (dist.get_rank(group) == 0)
    groups = [{"params": [head], "shared": False}, *({"params": [[param]]} for param in params)]
    opt = ShiftingMetaOptimizer(groups, process_group=group)
    for param in (*params, *head):
        param.grad = torch.ones_like(param)
    return raised(opt.step), opt.meta_updates
