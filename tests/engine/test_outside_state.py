"""State and groups set from outside between two steps are taken over, as in SGD, or refused before anything moved."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support.nets import assert_same
from support.outside import KINDS, Problem, everywhere, exchange_all, exchange_data, exchange_tensors, in_both

from cts_fast import ShiftingMetaOptimizer

# State


def exchange_whole(opt):
    opt.state = {param: {name: value.clone() for name, value in entry.items()} for param, entry in opt.state.items()}


@everywhere
@in_both
@pytest.mark.parametrize("exchange", [exchange_all, exchange_tensors, exchange_data, exchange_whole])
def test_exchanged_state_is_the_state(backend, dtype, exchange):
    one, other = (Problem(backend, dtype, meta_lr=0.25, dampening=0.5, horizon=5) for _ in range(2))
    one.step(2), other.step(2)
    exchange(one.opt)
    one.step(2), other.step(2)
    assert_same(one.values(), other.values())
    entry = one.opt.state_dict()["state"][0]
    assert int(entry["counters"][0]) == one.opt.inner_step == 4
    assert torch.equal(entry["theta"].to(dtype), one.nets[0]["body"].weight)
    assert entry["initialization"].data_ptr() == one.opt.initialization[0].data_ptr()


@everywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["entry", "tensor", "data", "in place"])
def test_new_momentum_counts_as_in_sgd(backend, kind, how):
    problem = Problem(backend)
    problem.step(2)
    param = problem.param(kind)
    new = torch.full_like(param, 2.0).detach()
    if how == "entry":
        problem.opt.state[param] = {**problem.opt.state[param], "momentum_buffer": new}
    elif how == "tensor":
        problem.opt.state[param]["momentum_buffer"] = new
    elif how == "data":
        problem.opt.state[param]["momentum_buffer"].data = new
    else:
        problem.opt.state[param]["momentum_buffer"].fill_(2.0)
    before, gradient = param.detach().clone(), torch.ones_like(param)
    param.grad = gradient
    problem.opt.step()
    assert torch.equal(param, before - 0.125 * (0.5 * 2 + gradient))
    assert new.eq(2).all(), "the user's tensor was written"
    problem.assert_follows_sgd()


@everywhere
@pytest.mark.parametrize("how", ["clear", "new", "entries", "pop", "momentum", "none"])
def test_cleared_state_starts_anew_as_in_sgd(backend, how):
    problem = Problem(backend, dampening=0.5)
    problem.step(2)
    opt, phi = problem.opt, [p.clone() for p in problem.opt.initialization]
    if how == "clear":
        opt.state.clear()
    elif how == "new":
        opt.state = type(opt.state)()
    elif how == "entries":
        for param in problem.params():
            opt.state[param] = {}
    elif how == "pop":
        for param in problem.params():
            opt.state.pop(param)
    else:
        for param in problem.params():
            if how == "none":
                opt.state[param]["momentum_buffer"] = None
            else:
                del opt.state[param]["momentum_buffer"]
    before = [p.detach().clone() for p in problem.params()]
    problem.gradients()
    opt.step()
    for p, q in zip(problem.params(), before, strict=True):
        assert torch.equal(p, q - 0.125 * p.grad), "a first gradient enters undamped"
    assert_same(phi, opt.initialization)
    assert opt.inner_step == 3


@everywhere
def test_momentum_of_two_tasks_can_change_places(backend):
    problem = Problem(backend)
    problem.step(2)
    a, b = problem.opt.state[problem.param("shared", 0)], problem.opt.state[problem.param("shared", 1)]
    first, second = a["momentum_buffer"].clone(), b["momentum_buffer"].clone()
    a["momentum_buffer"], b["momentum_buffer"] = b["momentum_buffer"], a["momentum_buffer"]
    for p in problem.params():
        p.grad = torch.zeros_like(p)
    problem.opt.step()
    assert torch.equal(problem.opt.state[problem.param("shared", 0)]["momentum_buffer"], 0.5 * second)
    assert torch.equal(problem.opt.state[problem.param("shared", 1)]["momentum_buffer"], 0.5 * first)


@everywhere
def test_an_exchanged_initialization_is_taken_over(backend):
    problem = Problem(backend, meta_lr=0.5, lr=0.0)
    problem.step()
    phi = problem.opt.initialization[0]
    problem.opt.state[problem.nets[0]["body"].weight]["initialization"] = torch.full_like(phi, 3.0)
    theta = problem.nets[0]["body"].weight.detach().clone()
    problem.step()
    assert torch.allclose(phi, 3.0 + 0.5 * (theta - 3.0)) and problem.opt.initialization[0] is phi


@everywhere
@in_both
@pytest.mark.parametrize("ended", [False, True], ids=["constructed", "after a reset"])
@pytest.mark.parametrize("how", ["in place", "entry", "data", "in place of data", "by name, held, as NumPy"])
def test_an_initialization_written_before_a_round_is_not_undone_by_its_first_step(backend, dtype, ended, how):
    problem = Problem(backend, dtype, lr=0.0, meta_lr=0.5, horizon=2)
    held = problem.opt.initialization_state_dict()["weight"] if how.endswith("NumPy") else None
    problem.step(2 * ended)
    weight, (phi, *others) = problem.nets[0]["body"].weight, problem.opt.initialization
    theta, rest = weight.detach().float().clone(), [p.clone() for p in others]
    if how == "in place":
        phi.fill_(3.0)
    elif how == "entry":
        problem.opt.state[weight]["initialization"] = torch.full_like(phi, 3.0)
    elif how == "in place of data":
        phi.data.fill_(3.0)
    elif held is not None:
        held.numpy()[...] = 3.0
    else:
        problem.opt.initialization[0].data = torch.full_like(phi, 3.0)
    problem.step()
    torch.testing.assert_close(phi, 3.0 + 0.5 * (theta - 3.0))
    assert_same(rest, others)


@everywhere
def test_a_write_to_the_initialization_is_forgotten_with_its_round(backend):
    problem = Problem(backend, lr=0.0, horizon=2)
    for write in (lambda opt: opt.initialization[0].mul_(2.0), lambda opt: opt.load_state_dict(opt.state_dict())):
        problem.step()
        write(problem.opt)
        problem.step()
        for net in problem.nets:
            net["body"].weight.data.fill_(5.0)
        problem.step()
        assert problem.opt.initialization[0].eq(5).all(), "weights that all tasks were given are the new one"
        problem.opt.reset_tasks()


@everywhere
def test_momentum_given_before_the_first_gradient_counts_as_in_sgd(backend):
    problem = Problem(backend, dampening=0.5)
    shown, given = problem.param("shared"), problem.param("shared", 2)
    problem.opt.state[shown]["momentum_buffer"].fill_(2.0)
    problem.opt.state[given]["momentum_buffer"] = torch.full_like(given, 2.0)
    for param in (shown, given):
        before, param.grad = param.detach().clone(), torch.ones_like(param)
        problem.opt.step()
        param.grad = None
        assert torch.equal(param, before - 0.125 * (0.5 * 2 + 0.5))


@everywhere
def test_a_flag_of_first_gradients_counts_when_it_is_written_in_place(backend):
    problem = Problem(backend, dampening=0.5)
    problem.step(2)
    for param in problem.params():
        problem.opt.state[param]["momentum_buffer"].zero_()
        problem.opt.state[param]["momentum_started"].zero_()
    before = [p.detach().clone() for p in problem.params()]
    problem.step()
    for p, q in zip(problem.params(), before, strict=True):
        assert torch.equal(p, q - 0.125 * p.grad), "a first gradient enters undamped"


@everywhere
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("momentum_buffer", torch.zeros(2), r"task 1, parameter 'weight': 'momentum_buffer' is torch.float32 \(2,\)"),
        ("momentum_buffer", torch.zeros(3, 4, dtype=torch.float64), "torch.float64"),
        ("momentum_buffer", 3.0, "'momentum_buffer' is float in opt.state"),
        ("momentum_buffer", torch.zeros(3, 4, device="meta"), "meta device"),
        ("theta", "x", "'theta' is str"),
        ("momentum_started", torch.zeros(2), "'momentum_started'"),
    ],
)
def test_state_that_cannot_be_taken_over_is_refused(backend, name, value, message):
    problem = Problem(backend)
    problem.step()
    problem.opt.state[problem.param("shared")][name] = value
    problem.assert_refused(message)


@everywhere
@pytest.mark.parametrize("value", [None, [], 3], ids=str)
def test_state_that_is_no_mapping_is_refused(backend, value):
    problem = Problem(backend)
    problem.opt.state = value
    problem.assert_refused("opt.state is")


def test_negative_counters_are_refused():
    problem = Problem()
    problem.opt.state[problem.nets[0]["body"].weight]["counters"] = torch.tensor([-1, 0, 0, 0])
    problem.assert_refused("'counters'")


def test_what_users_keep_in_an_entry_stays():
    problem = Problem()
    problem.opt.state[problem.param("shared")]["mine"] = torch.ones(1)
    problem.step()
    assert problem.opt.state[problem.param("shared")]["mine"] == 1
    assert any("mine" in entry for entry in problem.opt.state_dict()["state"].values())


# Groups


@everywhere
@pytest.mark.parametrize("how", ["pop", "new list", "clear"])
def test_a_group_that_went_rests_and_comes_back(backend, how):
    problem = Problem(backend)
    problem.step(2)
    opt, heads = problem.opt, problem.opt.param_groups[1]
    resting, before = [p for p in heads["params"]], [p.detach().clone() for p in heads["params"]]
    if how == "pop":
        opt.param_groups.pop()
    elif how == "new list":
        opt.param_groups = opt.param_groups[:1]
    else:
        del opt.param_groups[1:]
    problem.step(2)
    assert_same(before, [p.detach() for p in resting])
    opt.state_dict(), pickle.dumps(opt)
    opt.param_groups.append(heads)
    problem.assert_follows_sgd()


def test_without_shared_groups_a_step_is_refused():
    problem = Problem()
    problem.opt.param_groups.pop(0)
    problem.assert_refused("no group with shared parameters is left")


@everywhere
def test_exchanged_groups_and_options_count(backend):
    problem = Problem(backend)
    problem.step()
    problem.opt.param_groups[0] = {**problem.opt.param_groups[0], "lr": 0.0}
    before = [p.detach().clone() for net in problem.nets for p in net["body"].parameters()]
    problem.step()
    assert_same(before, [p.detach() for net in problem.nets for p in net["body"].parameters()])
    del problem.opt.param_groups[0]["sizes"]
    problem.opt.param_groups[0]["lr"] = 0.125
    problem.assert_follows_sgd()


def test_numpys_numbers_are_kept_as_pythons(tmp_path):
    problem = Problem(lr=np.float64(0.125), momentum=np.float32(0.5), horizon=np.int64(7))
    problem.opt.param_groups[0]["meta_lr"] = np.float32(0.25)
    torch.save(problem.opt.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert {type(saved["param_groups"][0][name]) for name in ("lr", "momentum", "meta_lr")} == {float}
    problem.step()
    assert type(problem.opt.param_groups[0]["meta_lr"]) is float


@pytest.mark.parametrize(
    "broken",
    [
        None,
        3,
        [],
        {},
        {"state": None, "param_groups": []},
        {"state": {}, "param_groups": None},
        {"state": {}, "param_groups": [None, None]},
        {"state": {}, "param_groups": [{}, {}]},
        "entries",
        "counters",
        "strings",
    ],
    ids=str,
)
def test_malformed_state_dicts_raise_and_change_nothing(broken):
    problem = Problem()
    problem.step()
    good = copy.deepcopy(problem.opt.state_dict())
    if broken == "entries":
        broken = {**good, "state": {i: None for i in good["state"]}}
    elif broken == "counters":
        good["state"][0]["counters"] = torch.tensor([-3, 0, 0, 0])
        broken = good
    elif broken == "strings":
        broken = {**good, "state": {i: dict.fromkeys(entry, "x") for i, entry in good["state"].items()}}
    before, count = problem.values(), problem.opt.inner_step
    with pytest.raises(ValueError):
        problem.opt.load_state_dict(broken)
    assert_same(before, problem.values())
    assert problem.opt.inner_step == count


def test_a_negative_learning_rate_from_a_scheduler_raises():
    problem = Problem()
    schedule = torch.optim.lr_scheduler.LambdaLR(problem.opt, lambda epoch: 1 - 2 * epoch)
    problem.step()
    schedule.step()
    problem.assert_refused("Invalid learning rate: -0.125")


@everywhere
@in_both
def test_a_state_dict_that_was_shared_or_kept_binds_nobody(backend, dtype):
    problem, twin = Problem(backend, dtype, meta_lr=0.25), Problem(backend, dtype, meta_lr=0.25)
    problem.step(), twin.step()
    kept = problem.opt.state_dict()
    for entry in problem.opt.state_dict()["state"].values():
        for name in ("theta", "momentum_buffer", "initialization"):
            if name in entry:
                entry[name].share_memory_()  # as a queue to another process does
    problem.step(), twin.step()
    assert_same(problem.values(), twin.values())
    weight = problem.nets[0]["body"].weight
    assert torch.equal(kept["state"][0]["theta"].to(dtype), weight), "a state dict holds references"


def test_what_users_keep_in_an_entry_is_saved_and_loaded():
    problem, other = Problem(), Problem()
    problem.opt.state[problem.param("shared")]["mine"] = torch.ones(1)
    problem.step()
    other.opt.load_state_dict(problem.opt.state_dict())
    assert other.opt.state[other.param("shared")]["mine"] == 1
    other.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_numbers_in_another_order_are_a_write_to_the_initialization_too(dtype):
    params = [[torch.nn.Parameter(torch.arange(6, dtype=dtype))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=0.0, meta_lr=0.0)
    opt.initialization[0].data.copy_(torch.arange(6, dtype=dtype).flip(0))
    params[0][0].grad = torch.zeros(6, dtype=dtype)
    opt.step()
    assert torch.equal(opt.initialization[0], torch.arange(6, dtype=dtype).flip(0))
