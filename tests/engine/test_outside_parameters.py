"""Parameters set from outside between two steps are taken over, as in SGD, or refused before anything moved."""

import copy
import pickle
import warnings

import pytest
import torch
from support.nets import assert_same
from support.outside import KINDS, Problem, everywhere, in_both
from torch import nn

from cts_fast import ShiftingMetaOptimizer

# Parameters


@everywhere
@in_both
@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_shown_and_put_back_is_as_it_was(backend, dtype, kind):
    problem = Problem(backend, dtype)
    problem.step()
    param = problem.param(kind)
    want, backup = param.detach().clone(), param.data
    param.data = torch.zeros_like(param)
    for look in (problem.opt.state_dict, lambda: pickle.dumps(problem.opt), lambda: copy.deepcopy(problem.opt)):
        look()
        assert torch.equal(backup, want) and not param.any(), "a call that only reads wrote"
    param.data = backup
    assert torch.equal(param, want)
    problem.assert_follows_sgd()


@everywhere
@in_both
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_shown_weights_leaves_the_backup_alone(backend, dtype, kind):
    problem = Problem(backend, dtype)
    problem.step()
    param = problem.param(kind)
    want, backup = param.detach().clone(), param.data
    param.data = torch.zeros_like(param)
    momentum = problem.opt.state[param]["momentum_buffer"].clone()
    problem.gradients()
    problem.opt.step()
    expected = -0.125 * (0.5 * momentum.float() + param.grad.float())
    torch.testing.assert_close(param.float(), expected, atol=1e-2, rtol=1e-2)
    assert torch.equal(backup, want), "the backup was written"
    param.data = backup
    problem.assert_follows_sgd()


@everywhere
def test_the_state_dict_says_what_parameters_hold_now(backend):
    problem = Problem(backend)
    problem.step()
    param = problem.nets[0]["body"].weight
    param.data = torch.full_like(param, 7.0)
    assert (problem.opt.state_dict()["state"][0]["theta"] == 7).all()
    with torch.no_grad():
        problem.nets[0]["body"].bias.fill_(5.0)
    assert (problem.opt.state_dict()["state"][1]["theta"] == 5).all()


def test_modules_cast_and_cast_back_around_a_save():
    problem = Problem()
    problem.step()
    for net in problem.nets:
        net.half()
    saved = problem.opt.state_dict()["state"][0]["theta"]
    assert saved.dtype == torch.float32 and torch.equal(saved.half(), problem.nets[0]["body"].weight)
    with pytest.raises(ValueError, match="task 0, parameter 'weight': was torch.float32.*torch.float16"):
        problem.gradients()
        problem.opt.step()
    for net in problem.nets:
        net.float()
    problem.assert_follows_sgd()


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_another_parameter_in_a_group_is_trained(backend, kind):
    problem = Problem(backend)
    problem.step(2)
    net = problem.nets[1]["body" if kind == "shared" else "head"]
    old = net.weight
    net.weight = new = nn.Parameter(torch.ones_like(old))
    for group in problem.opt.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    phi = [p.clone() for p in problem.opt.initialization]
    before = old.detach().clone()
    problem.assert_follows_sgd()
    assert torch.equal(old, before) and (new != 1).any()
    assert_same(phi, problem.opt.initialization)


@everywhere
def test_another_first_parameter_keeps_the_initialization_and_the_counters(backend):
    problem = Problem(backend, meta_lr=0.5)
    problem.step(2)
    body = problem.nets[0]["body"]
    problem.opt.param_groups[0]["params"][0] = body.weight = nn.Parameter(body.weight.detach().clone())
    twin = Problem(backend, meta_lr=0.5)
    twin.step(2)
    twin.opt.state[twin.nets[0]["body"].weight]["momentum_buffer"].zero_()
    problem.step(), twin.step()
    assert_same([p.clone() for p in problem.opt.initialization], list(twin.opt.initialization))
    assert problem.opt.inner_step == 3


@pytest.mark.parametrize("edit", ["shape", "cut", "twice", "missing", "no dict", "number", "sparse"])
def test_groups_that_cannot_be_read_are_refused(edit):
    problem = Problem()
    problem.step()
    groups = problem.opt.param_groups
    if edit == "shape":
        groups[0]["params"][0] = nn.Parameter(torch.ones(2))
        message = "task 1, parameter '0': shape|task 0, parameter"
    elif edit == "cut":
        del groups[0]["params"][0]
        message = "group 0: holds 5 parameters"
    elif edit == "twice":
        groups[0]["params"][0] = groups[0]["params"][1]
        message = "group 0: a parameter stands twice"
    elif edit == "missing":
        groups.append({"params": [nn.Parameter(torch.ones(2)) for _ in range(3)]})
        message = "group 2: 'lr' is missing"
    elif edit == "no dict":
        groups[1] = list(groups[1]["params"])
        message = "group 1: is no dict"
    elif edit == "number":
        groups[0]["params"][0] = 3.0
        message = "can only optimize Tensors"
    else:
        groups[0]["params"][0] = nn.Parameter(torch.eye(4)[:3].to_sparse(), requires_grad=False)
        message = "layout is torch.sparse_coo"
    problem.assert_refused(message, (ValueError, TypeError))


# The start of a round


@everywhere
@in_both
@pytest.mark.parametrize("how", ["load_state_dict", "data", "in place"])
def test_equal_weights_loaded_into_all_tasks_are_the_new_initialization(backend, dtype, how):
    problem = Problem(backend, dtype, lr=0.0, meta_lr=0.25, horizon=2)
    for moment in range(2):
        for net in problem.nets:
            if how == "load_state_dict":
                net["body"].load_state_dict({k: v * 0 + 3 + moment for k, v in net["body"].state_dict().items()})
            for p in net["body"].parameters():
                if how == "data":
                    p.data = torch.full_like(p, 3.0 + moment)
                elif how == "in place":
                    p.data.fill_(3.0 + moment)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            problem.step(2)  # the round ends
        for value in (*problem.opt.initialization, *(p for net in problem.nets for p in net["body"].parameters())):
            assert (value == 3 + moment).all(), "the weights drifted"


@everywhere
def test_unequal_weights_at_the_start_of_a_round_are_named(backend):
    problem = Problem(backend, meta_lr=0.25)
    with torch.no_grad():
        problem.nets[2]["body"].bias.add_(1.0)
    problem.gradients()
    with pytest.warns(UserWarning, match="task 2, parameter 'bias': differs from the initialization"):
        problem.opt.step()


def test_within_a_round_writes_move_theta_alone():
    problem = Problem(meta_lr=0.0)
    problem.step()
    phi = [p.clone() for p in problem.opt.initialization]
    for net in problem.nets:
        net["body"].weight.data.fill_(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.step()
    assert_same(phi, problem.opt.initialization)


@everywhere
def test_another_memory_format_stays(backend):
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], lr=0.5, backend=backend)
    for net in nets:
        net.to(memory_format=torch.channels_last)
    before = nets[1][0].weight.detach().clone()
    for net in nets:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    opt.step()
    for net in nets:
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(net[0].weight, before - 0.5 - 0.005)
    assert (
        torch.allclose(opt.initialization[0], before - 0.005) and opt.state[nets[0][0].weight]["momentum_started"] == 0
    )


@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
def test_freed_memory_is_refused(what):
    problem = Problem()
    problem.step()
    param = problem.param("shared")
    problem.gradients()
    if what == "parameter":
        param.data = param.data.clone()
        param.untyped_storage().resize_(0)
        message = "task 1, parameter 'weight': has no memory"
    elif what == "gradient":
        param.grad.untyped_storage().resize_(0)
        message = "task 1, parameter 'weight': gradient has no memory"
    else:
        problem.opt.state[param]["momentum_buffer"] = freed = torch.zeros(3, 4)
        freed.untyped_storage().resize_(0)
        message = "task 1, parameter 'weight': 'momentum_buffer' has no memory"
    others = [p for p in problem.params() if p is not param]
    before = [p.detach().clone() for p in others]
    with pytest.raises(ValueError, match=message):
        problem.opt.step()
    assert_same(before, [p.detach() for p in others])


def test_only_some_nets_compiled_are_alike():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    opt = ShiftingMetaOptimizer([nets[0].named_parameters(), torch.compile(nets[1]).named_parameters()])
    other = ShiftingMetaOptimizer([torch.compile(net).named_parameters() for net in nets])
    other.load_state_dict(opt.state_dict())
    assert list(other.initialization_state_dict()) == ["weight", "bias"]
