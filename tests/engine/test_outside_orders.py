"""Changes from outside, combined and in odd orders: surgery with inherited state, edits around saves, interrupts."""

import copy
import gc
import pickle
import weakref
from collections import defaultdict

import pytest
import torch
from support.nets import assert_same
from support.outside import Problem, everywhere, exchange_tensors
from torch import nn

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS
from cts_fast.engine.layout import Flat


def zero_gradients(problem):
    for p in problem.params():
        p.grad = torch.zeros_like(p)


@everywhere
@pytest.mark.parametrize("act", ["held", "pop", "load", "add"])
def test_an_interrupt_while_buffers_are_laid_out_anew_leaves_a_way_on(backend, act, monkeypatch):
    for moment in (0, 3, 5):
        problem, twin = Problem(backend, meta_lr=0.25), Problem(backend, meta_lr=0.25)
        problem.step(2), twin.step(2)
        held = [p.data for p in problem.params()]
        for p in problem.params():
            p.data = p.data.clone()
        if act == "pop":
            problem.opt.param_groups.pop(), twin.opt.param_groups.pop()
        state, more = copy.deepcopy(problem.opt.state_dict()), [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        calls, real = [], Flat.adopt_

        def interrupted(self, *args, calls=calls, real=real, moment=moment):
            calls.append(1)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt
            real(self, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Flat, "adopt_", interrupted)
            if act == "load":
                problem.opt.load_state_dict(state)
            elif act == "add":
                problem.opt.add_param_group({"params": [[("more", p)] for p in more]})
            else:
                problem.gradients()
                problem.opt.step()
        if act in ("held", "pop"):
            twin.gradients()  # the same draw
        problem.step(2), twin.step(2)
        assert_same(problem.values()[: len(problem.params())], twin.values()[: len(twin.params())])
        assert_same(list(problem.opt.initialization), list(twin.opt.initialization))
        assert problem.opt.inner_step == twin.opt.inner_step and len(held) == len(problem.params())


@everywhere
def test_new_parameters_of_another_shape_that_inherit_an_entry(backend):
    problem = Problem(backend)
    problem.step(2)
    group = problem.opt.param_groups[0]
    for t, net in enumerate(problem.nets):
        i, old = 2 * t, group["params"][2 * t]
        new = nn.Parameter(torch.cat([old.detach(), torch.zeros(2, 4)]))
        entry = dict(problem.opt.state.pop(old))
        entry["momentum_buffer"] = torch.cat([entry["momentum_buffer"], torch.zeros(2, 4)])
        group["params"][i] = net["body"].weight = new
        problem.opt.state[new] = entry
    problem.assert_follows_sgd()
    assert problem.opt.initialization[0].shape == (5, 4)


@everywhere
@pytest.mark.parametrize("value", [None, torch.zeros(9), torch.zeros(2, 3, dtype=torch.float64)], ids=str)
def test_state_of_a_resting_group_is_checked_when_it_comes_back(backend, value):
    problem = Problem(backend)
    problem.step(2)
    group = problem.opt.param_groups.pop()
    problem.step()
    problem.opt.state[problem.nets[0]["head"].weight]["momentum_buffer"] = value
    problem.opt.param_groups.append(group)
    if value is None:  # as in SGD it starts anew
        problem.assert_follows_sgd()
    else:
        problem.assert_refused("task 0, parameter 'head.0|'weight': 'momentum_buffer'")


@everywhere
def test_parameters_in_another_task_order_keep_the_initialization(backend):
    problem = Problem(backend, meta_lr=0.25)
    problem.step(3)
    phi = [p.clone() for p in problem.opt.initialization]
    group = problem.opt.param_groups[0]
    group["params"] = [p for net in reversed(problem.nets) for p in net["body"].parameters()]
    group.update(meta_lr=0.0)
    problem.assert_follows_sgd()
    assert_same(phi, list(problem.opt.initialization))


@everywhere
def test_names_go_where_their_parameters_go(backend):
    nets = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)]
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], lr=0.0, backend=backend)
    before = {name: phi.clone() for name, phi in opt.initialization_state_dict().items()}
    group = opt.param_groups[0]
    group["params"] = [p for net in nets for p in (*list(net.parameters())[2:], *list(net.parameters())[:2])]
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    opt.step()
    after = opt.initialization_state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


@everywhere
def test_loading_references_in_another_order(backend):
    problem = Problem(backend, meta_lr=0.25)
    problem.step(2)
    a, b = (problem.opt.state[problem.param("shared", t)]["momentum_buffer"].clone() for t in (0, 1))
    saved = problem.opt.state_dict()
    entries = saved["state"]
    i, j = 0, len(problem.opt.param_groups[0]["params"]) // 3
    first, second = entries[i]["momentum_buffer"], entries[j]["momentum_buffer"]
    entries[i]["momentum_buffer"], entries[j]["momentum_buffer"] = second, first
    problem.opt.load_state_dict(saved)
    now = [problem.opt.state[problem.param("shared", t)]["momentum_buffer"] for t in (0, 1)]
    assert torch.equal(now[0], b) and torch.equal(now[1], a)


@everywhere
def test_a_load_reads_its_references_before_it_writes(backend):
    problem = Problem(backend)
    problem.step()
    saved, weight = problem.opt.state_dict(), problem.param("shared")
    want = weight.detach().clone()
    weight.data = torch.zeros_like(weight)
    problem.opt.load_state_dict(saved)
    assert torch.equal(weight, want)


def test_an_initialization_of_its_own_tensors_in_another_order():
    nets = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets])
    phi = opt.initialization_state_dict()
    a, b = phi["0.weight"].clone(), phi["1.weight"].clone()
    opt.load_initialization({**phi, "0.weight": phi["1.weight"], "1.weight": phi["0.weight"]})
    assert torch.equal(phi["0.weight"], b) and torch.equal(phi["1.weight"], a)


@everywhere
@pytest.mark.parametrize("entry", [None, "read", "momentum"])
def test_new_parameters_keep_their_own_weights_and_the_initialization(backend, entry):
    problem = Problem(backend)
    problem.step(3)
    group, phi = problem.opt.param_groups[0], [p.clone() for p in problem.opt.initialization]
    for t, net in enumerate(problem.nets):
        group["params"][2 * t] = net["body"].weight = new = nn.Parameter(group["params"][2 * t].detach().clone())
        if entry == "read":
            _ = problem.opt.state[new]
        elif entry == "momentum":
            problem.opt.state[new] = {"momentum_buffer": torch.zeros_like(new)}
    problem.assert_follows_sgd()
    assert_same(phi, list(problem.opt.initialization))


@everywhere
def test_parameters_tied_after_construction_are_refused(backend):
    problem = Problem(backend)
    problem.step()
    own = problem.param("shared", 1).data
    problem.param("shared", 1).data = problem.param("shared", 0).data
    problem.assert_refused("task 1, parameter 'weight': lies in the memory of task 0, parameter 'weight'")
    problem.param("shared", 1).data = own
    problem.assert_follows_sgd()


@everywhere
@pytest.mark.parametrize("edit", ["pop first", "new parameter", "no sizes"])
def test_saving_between_an_edit_of_groups_and_the_next_step(backend, edit):
    parts = ["a", "b"]
    tasks = {name: [nn.Parameter(torch.full((3,), float(t))) for t in range(2)] for name in parts}
    groups = [{"params": [[(name, p)] for p in tasks[name]]} for name in parts]
    opt = ShiftingMetaOptimizer(groups, lr=0.1, meta_lr=0.0, backend=backend)

    def step(opt):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        opt.step()

    step(opt), step(opt)
    if edit == "pop first":
        opt.param_groups.pop(0)
    elif edit == "new parameter":
        opt.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    else:
        del opt.param_groups[0]["sizes"]
    saved = copy.deepcopy(opt.state_dict())
    other, third = pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)
    for one in (opt, other, third):
        step(one)
        assert one.inner_step == 3
        assert_same(list(one.initialization), list(opt.initialization))
        for p, q in zip(one.param_groups[-1]["params"], opt.param_groups[-1]["params"], strict=True):
            assert torch.equal(p, q)
    opt.load_state_dict(saved)
    assert opt.inner_step == 2


def test_what_was_deleted_from_the_state_stays_away_and_is_freed():
    problem = Problem()
    problem.step(2)
    count = len(problem.opt.state)
    for _ in range(3):
        old, body = problem.nets[0]["body"].weight, problem.nets[0]["body"]
        problem.opt.param_groups[0]["params"][0] = body.weight = nn.Parameter(old.detach().clone())
        del problem.opt.state[old]
        alive = weakref.ref(old)
        del old
        problem.step(2)
        gc.collect()
        assert alive() is None and len(problem.opt.state) == count


def test_a_methods_numbers_are_the_state_too():
    params = [[nn.Parameter(torch.ones(5))] for _ in range(2)]
    opt = METHODS["leap"](params, lr=0.1, horizon=5)

    def step():
        for t, (p,) in enumerate(params):
            p.grad = torch.full_like(p, float(t))
        opt.step(losses=[1.0, 2.0])

    step(), step()
    entry = opt.state[params[0][0]]
    entry["previous_loss"].data = torch.tensor(77.0, dtype=torch.float64)
    opt.engine.sync_(opt.param_groups, opt.state)
    assert opt.engine.numbers["previous_loss"].read() == [77.0, 2.0]
    entry["previous_loss"] = torch.tensor(55.0, dtype=torch.float64)
    opt.engine.sync_(opt.param_groups, opt.state)
    assert opt.engine.numbers["previous_loss"].read() == [55.0, 2.0]
    entry["previous_loss"] = torch.zeros(3)
    with pytest.raises(ValueError, match="task 0, parameter '0': 'previous_loss'"):
        step()


@pytest.mark.parametrize(
    "value", [torch.zeros(4), torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)]
)
def test_counters_of_another_kind_are_refused(value):
    problem = Problem()
    problem.step()
    counters = problem.opt.state[problem.nets[0]["body"].weight]["counters"]
    counters.data = value
    problem.gradients()
    with pytest.raises(ValueError, match="'counters' is torch"):
        problem.opt.step()


def test_the_state_copies_as_a_defaultdict():
    problem = Problem()
    problem.step()
    state, other = problem.opt.state, {torch.zeros(1): {}}
    for copied in (state.copy(), copy.copy(state), state | {}, type(state)(dict), type(state)(dict, state)):
        assert isinstance(copied, defaultdict) and copied[torch.zeros(1)] == {}
    assert len(state | other) == len(other | state) == len(state) + 1
    problem.opt.state = state.copy()
    problem.step()
    problem.opt.state = defaultdict(dict, {p: dict(entry) for p, entry in problem.opt.state.items()})
    problem.assert_follows_sgd()


@pytest.mark.parametrize("broken", [None, 3, "entry"])
def test_a_load_repairs_a_broken_state(broken):
    problem = Problem()
    problem.step(2)
    good, want = copy.deepcopy(problem.opt.state_dict()), problem.values()
    if broken == "entry":
        problem.opt.state[problem.param("shared")] = [1]
    else:
        problem.opt.state = broken
    with pytest.raises(ValueError, match="opt.state"):
        problem.opt.state_dict()
    problem.assert_refused("opt.state")
    problem.opt.load_state_dict(good)
    assert_same(want, problem.values())
    problem.assert_follows_sgd()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("param_names", None),
        ("param_names", [[0]]),
        ("shared", torch.zeros(3)),
        ("nesterov", "x"),
        ("nesterov", []),
        ("maximize", torch.zeros(1, device="meta")),
        ("reset_momentum", "x"),
        ("lr", torch.zeros(1, device="meta")),
        ("shift", torch.zeros((), device="meta")),
        ("horizon", "x"),
        ("sizes", 3),
    ],
    ids=str,
)
def test_malformed_groups_of_a_state_dict_raise_and_change_nothing(name, value):
    problem = Problem()
    problem.step()
    saved, before = copy.deepcopy(problem.opt.state_dict()), problem.values()
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError):
        problem.opt.load_state_dict(saved)
    assert_same(before, problem.values())
    problem.assert_follows_sgd()


def test_hooks_before_a_state_dict_see_the_live_state():
    problem = Problem()
    problem.step()
    weight = problem.nets[0]["body"].weight

    def hook(opt):
        weight.data = torch.zeros_like(weight)
        opt.state[weight]["mine"] = torch.ones(1)

    handle = problem.opt.register_state_dict_pre_hook(hook)
    entry = problem.opt.state_dict()["state"][0]
    handle.remove()
    assert not entry["theta"].any() and "mine" in problem.opt.state[weight]


def test_options_outlast_the_group_they_were_set_in():
    a, b = ([nn.Parameter(torch.zeros(2)) for _ in range(2)] for _ in range(2))
    opt = ShiftingMetaOptimizer([{"params": [[("a", p)] for p in a]}, {"params": [[("b", p)] for p in b]}])
    opt.param_groups[0]["horizon"] = 2
    opt.param_groups.pop(0)
    for _ in range(4):
        b[0].grad = torch.ones(2)
        opt.step()
    assert opt.round == 2 and opt.param_groups[0]["horizon"] == 2


@everywhere
def test_a_shape_changed_in_place_is_refused(backend):
    problem = Problem(backend)
    problem.step()
    weight = problem.param("shared")
    weight.data = weight.data[:2]
    for p in problem.params():
        p.grad = None
    problem.nets[0]["body"].bias.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"task 1, parameter 'weight': was torch.float32 \(3, 4\).*\(2, 4\)"):
        problem.opt.step()
    with pytest.raises(ValueError, match="task 1, parameter 'weight'"):
        problem.opt.reset_tasks()


def test_exchanges_of_a_head_and_a_shared_entry_after_a_pop():
    problem = Problem(meta_lr=0.25)
    problem.step(2)
    group = problem.opt.param_groups.pop()
    exchange_tensors(problem.opt)
    problem.step()
    problem.opt.param_groups.append(group)
    problem.opt.param_groups[0]["meta_lr"] = problem.opt.param_groups[1]["meta_lr"] = 0.0
    problem.assert_follows_sgd()


@pytest.mark.parametrize("how", ["clear", "new", "delete", "none"])
def test_a_cleared_momentum_is_saved_as_cleared(how):
    problem, other = Problem(dampening=0.5), Problem(dampening=0.5)
    problem.step(2)
    if how == "clear":
        problem.opt.state.clear()
    elif how == "new":
        problem.opt.state = defaultdict(dict)
    else:
        for p in problem.params():
            if how == "none":
                problem.opt.state[p]["momentum_buffer"] = None
            else:
                del problem.opt.state[p]["momentum_buffer"]
    saved = copy.deepcopy(problem.opt.state_dict())
    assert not any(e["momentum_buffer"].any() or e["momentum_started"] for e in saved["state"].values())
    other.opt.load_state_dict(saved)
    other.draw.set_state(problem.draw.get_state())
    problem.step(2), other.step(2)
    assert_same(problem.values(), other.values())
    assert other.opt.inner_step == 4
