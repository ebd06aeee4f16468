"""What users set from outside between two steps is taken over by the next one, as torch.optim.SGD would, or refused before anything moved."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from support.nets import assert_same
from support.step_cases import places
from torch import nn

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS

BACKENDS = [*dict.fromkeys(backend for backend, device in places() if device == "cpu"), "reference"]
DTYPES = [torch.float32, torch.bfloat16]
everywhere = pytest.mark.parametrize("backend", BACKENDS)
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = ["shared", "head"]


class Problem:
    """Three small nets with heads, their optimizer, and SGDs of the same nets: with meta_lr 0 each task follows its own."""

    def __init__(self, backend="auto", dtype=torch.float32, **options):
        torch.manual_seed(0)
        base = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)}).to(dtype)
        self.nets = [copy.deepcopy(base) for _ in range(3)]
        self.options = {"lr": 0.125, "momentum": 0.5, "meta_lr": 0.0, "horizon": None, **options}
        self.opt = ShiftingMetaOptimizer(
            [net["body"].named_parameters() for net in self.nets],
            heads=[net["head"].parameters() for net in self.nets],
            backend=backend,
            **self.options,
        )
        self.draw = torch.Generator().manual_seed(1)

    def twins(self):
        """Copies of the nets with a torch.optim.SGD each, in the state that they are in now."""
        nets = copy.deepcopy(self.nets)
        sgds = [torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.5) for net in nets]
        for net, twin, sgd in zip(self.nets, nets, sgds, strict=True):
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                entry = self.opt.state.get(p, {})
                if entry.get("momentum_started"):
                    sgd.state[q]["momentum_buffer"] = entry["momentum_buffer"].clone()
        return nets, sgds

    def gradients(self, *others):
        for params in zip(self.params(), *(self.params(nets) for nets in others), strict=True):
            gradient = torch.randint(-4, 5, params[0].shape, generator=self.draw).to(params[0].dtype) / 8
            for param in params:
                param.grad = gradient.clone()

    def params(self, nets=None):
        return [p for net in nets or self.nets for p in net.parameters()]

    def step(self, count=1):
        for _ in range(count):
            self.gradients()
            self.opt.step()

    def values(self):
        states = [self.opt.state[p] for p in self.params()]
        return [v.clone() for v in (*self.params(), *self.opt.initialization, *(s["momentum_buffer"] for s in states))]

    def param(self, kind, t=1):
        return self.nets[t]["body" if kind == "shared" else "head"].weight

    def assert_follows_sgd(self, steps=3):
        """From here on every task moves as its own SGD does."""
        twins, sgds = self.twins()
        for _ in range(steps):
            self.gradients(twins)
            self.opt.step()
            for sgd in sgds:
                sgd.step()
            close = 0.0 if self.params()[0].dtype == torch.float32 else 0.02  # SGD has no master
            for p, q in zip(self.params(), self.params(twins), strict=True):
                torch.testing.assert_close(p, q, rtol=close, atol=close)

    def assert_refused(self, message, kind=ValueError):
        """The step raises, names what is wrong, and nothing has moved."""
        self.gradients()
        before, count = [p.detach().clone() for p in self.params()], self.opt.inner_step
        with pytest.raises(kind, match=message):
            self.opt.step()
        assert_same(before, [p.detach() for p in self.params()])
        assert self.opt.inner_step == count


# State


def exchange_all(opt):
    for param in list(opt.state):
        opt.state[param] = {name: value.clone() for name, value in opt.state[param].items()}


def exchange_tensors(opt):
    for entry in opt.state.values():
        for name, value in entry.items():
            entry[name] = value.clone()


def exchange_data(opt):
    for entry in opt.state.values():
        for value in entry.values():
            value.data = value.data.clone()


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


# Memory that others hold


def test_parameters_in_shared_memory_are_refused_at_once_and_later():
    net = nn.Linear(2, 2).share_memory()
    with pytest.raises(ValueError, match="task 0, parameter 'weight': lies in memory shared"):
        ShiftingMetaOptimizer([net.named_parameters()])
    problem = Problem()
    problem.step()
    problem.nets[1].share_memory()
    problem.assert_refused("task 1, parameter 'weight': lies in memory shared")


@pytest.mark.parametrize("which", ["initialization", "state", "held"])
def test_shared_state_is_refused_and_can_be_taken_out(which):
    problem = Problem(meta_lr=0.5)
    problem.step()
    param = problem.param("shared", 0)
    if which == "held":
        tensor = problem.opt.state[param]["momentum_buffer"]
        problem.step()
        tensor.share_memory_()
    else:
        tensor = problem.opt.state[param]["momentum_buffer"] if which == "state" else problem.opt.initialization[0]
        tensor.share_memory_()
    problem.assert_refused("lies in memory shared")
    tensor.data = tensor.data.clone()
    problem.step(2)
    entry = problem.opt.state[param]
    live = entry["momentum_buffer"] if which != "initialization" else entry["initialization"]
    assert live is tensor and int(entry["counters"][0]) == problem.opt.inner_step


def test_an_optimizer_is_not_sent_to_a_spawned_process():
    problem = Problem()
    process = torch.multiprocessing.get_context("spawn").Process(target=print, args=(problem.opt,))
    with pytest.raises(RuntimeError, match="cannot be sent to another process"):
        process.start()
    problem.step()


@pytest.mark.parametrize("where", ["one task", "two tasks", "head", "part"])
def test_parameters_in_one_memory_are_refused(where):
    memory = torch.zeros(6)
    one, two = nn.Parameter(memory[:4]), nn.Parameter(memory[2:] if where == "part" else memory[:4])
    tasks, heads = [[one], [two]], None
    if where == "one task":
        tasks = [[one, two]]
    elif where == "head":
        tasks, heads = [[one]], [[two]]
    with pytest.raises(ValueError, match="lies in the memory of task 0, parameter '0'"):
        ShiftingMetaOptimizer(tasks, heads=heads)


def test_interleaved_views_of_one_memory_are_two_parameters():
    memory = torch.zeros(2, 4)
    tasks = [[nn.Parameter(memory[t])] for t in range(2)]
    opt = ShiftingMetaOptimizer(tasks, lr=1.0)
    tasks[0][0].grad = torch.ones(4)
    opt.step()
    columns = [nn.Parameter(torch.zeros(4, 2)[:, 0]), nn.Parameter(torch.zeros(4, 2)[:, 1])]
    with pytest.warns(UserWarning, match="view of larger memory"):
        ShiftingMetaOptimizer([columns])


def test_an_expanded_parameter_is_refused():
    with pytest.raises(ValueError, match="several of its numbers lie in one place"):
        ShiftingMetaOptimizer([[nn.Parameter(torch.zeros(1).expand(4))]])


@pytest.mark.parametrize("kind", ["lazy", "freed", "zero"])
def test_tensors_without_memory_are_refused(kind):
    param = nn.Parameter(torch.ones(3))
    if kind == "lazy":
        param = nn.LazyLinear(2).weight
    elif kind == "freed":
        param.untyped_storage().resize_(0)
    else:
        param = torch._efficientzerotensor((3,)).requires_grad_()
    plain = nn.Parameter(torch.ones(2))
    before = plain.data_ptr()
    with pytest.raises(ValueError, match="task 0, parameter '1'"):
        ShiftingMetaOptimizer([[plain, param]])
    assert plain.data_ptr() == before


def test_views_of_phi_that_others_hold_stay_live_when_buffers_are_laid_out_anew():
    problem = Problem(meta_lr=0.5)
    problem.step()
    phi, theta = problem.opt.initialization[0], problem.opt.state[problem.param("shared", 0)]["theta"]
    problem.opt.add_param_group({"params": [[("more", nn.Parameter(torch.zeros(2)))] for _ in range(3)]})
    problem.step()
    assert phi is problem.opt.initialization[0] and torch.equal(theta, problem.param("shared", 0))
    entry = problem.opt.state[problem.param("shared", 0)]
    assert entry["initialization"] is phi and entry["theta"] is theta


def test_a_net_that_took_phi_by_assignment_makes_an_optimizer_of_its_own():
    problem = Problem(meta_lr=0.5)
    problem.step()
    net = nn.Linear(4, 3)
    net.load_state_dict(problem.opt.initialization_state_dict(), assign=True)
    before = [p.clone() for p in problem.opt.initialization]
    own = ShiftingMetaOptimizer([net.named_parameters()], lr=1.0)
    net.weight.grad = torch.ones(3, 4)
    own.step()
    assert_same(before, problem.opt.initialization)
    nets = [nn.Linear(4, 3) for _ in range(2)]
    for one in nets:
        one.load_state_dict(problem.opt.initialization_state_dict(), assign=True)
    with pytest.raises(ValueError, match="task 1, parameter 'weight': lies in the memory of task 0"):
        ShiftingMetaOptimizer([one.named_parameters() for one in nets])


# Gradients


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradients_values_count_not_its_memory(backend, kind):
    for gradient in (
        torch._neg_view(-torch.ones(6)),
        torch._efficientzerotensor((6,)),
        torch.ones(6, dtype=torch.float64),
        torch.ones(6, dtype=torch.bfloat16),
    ):
        params = [nn.Parameter(torch.zeros(6)) for _ in range(2)]
        heads = [[nn.Parameter(torch.zeros(6))] for _ in range(2)]
        opt = ShiftingMetaOptimizer(
            [[p] for p in params], heads=heads, lr=1.0, momentum=0.9, weight_decay=0.5, meta_lr=0.0, backend=backend
        )
        param = params[1] if kind == "shared" else heads[1][0]
        param.data.fill_(2.0) if kind == "head" else None
        start = param.detach().clone()
        param.grad_dtype = None
        param.grad = gradient
        opt.step()
        assert torch.equal(param, start - (gradient.float().clone() + 0.5 * start))
        assert opt.state[param]["momentum_started"]


@pytest.mark.parametrize("gradient", [torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")], ids=str)
def test_gradients_that_sgd_does_not_take_are_refused(gradient):
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = ShiftingMetaOptimizer([[p] for p in params], lr=1.0)
    params[0].grad = torch.ones(3)
    params[1].grad_dtype = None
    try:
        params[1].grad = gradient
    except RuntimeError:
        pytest.skip("this torch does not let such a gradient be set")
    with pytest.raises(ValueError, match="task 1, parameter '0': gradient is"):
        opt.step()
    assert not params[0].any() and opt.inner_step == 0


# Copies, wrappers, modes


def test_a_shallow_copy_is_a_second_handle():
    problem = Problem(meta_lr=0.25)
    other = copy.copy(problem.opt)
    twin = Problem(meta_lr=0.25)
    for i in range(6):
        problem.gradients()
        (other if i % 2 else problem.opt).step()
        twin.step()
    assert_same(problem.values(), twin.values())
    assert other.inner_step == problem.opt.inner_step == 6


class Wrapper(ShiftingMetaOptimizer):
    """As libraries wrap optimizers: a subclass that forwards what it lacks."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_a_wrapper_that_forwards_what_it_lacks():
    problem, twin = Problem(meta_lr=0.25), Problem(meta_lr=0.25)
    wrapper = Wrapper(problem.opt)
    for i in range(4):
        if i == 2:
            exchange_tensors(problem.opt)
            for p in (problem, twin):
                p.opt.add_param_group({"params": [[("more", nn.Parameter(torch.zeros(2)))] for _ in range(3)]})
        problem.gradients()
        (wrapper if i != 3 else problem.opt).step()
        twin.step()
    assert_same(problem.values(), twin.values())
    wrapper.load_state_dict(wrapper.state_dict())
    wrapper.zero_grad()


@everywhere
def test_inference_mode_leaves_training_possible(backend):
    plain, other = Problem(backend, meta_lr=0.25), Problem(backend, meta_lr=0.25)
    nets = copy.deepcopy(plain.nets)
    with torch.inference_mode():
        opt = ShiftingMetaOptimizer(
            [net["body"].named_parameters() for net in nets],
            heads=[net["head"].parameters() for net in nets],
            backend=backend,
            **other.options,
        )
    other.nets, other.opt = nets, opt
    for i in range(3):
        plain.step()
        other.gradients()
        with torch.inference_mode(i == 1):
            opt.step()
    more = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    with torch.inference_mode():
        opt.add_param_group({"params": [[("more", p)] for p in more]})
    nets[0]["head"](nets[0]["body"](torch.ones(1, 4))).sum().backward()
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.reset_tasks()
    with torch.inference_mode():
        made_there = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="was made under inference_mode"):
        ShiftingMetaOptimizer([[made_there]])


@everywhere
def test_a_cycle_through_a_parameter_is_freed(backend):
    gc.collect()
    nets = [nn.Linear(3, 2) for _ in range(2)]
    opt = ShiftingMetaOptimizer([net.parameters() for net in nets], backend=backend)
    nets[0].weight.optimizer = opt
    nets[0].weight.grad = torch.ones(2, 3)
    opt.step()
    alive = weakref.ref(opt)
    del opt, nets
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_take_over_exchanged_state_too(method):
    def run(exchange):
        torch.manual_seed(0)
        params = [[nn.Parameter(torch.ones(5))] for _ in range(3)]
        opt = METHODS[method](params, lr=0.1, momentum=0.5, horizon=3)
        for step in range(7):
            if exchange and step == 4:
                exchange_tensors(opt), exchange_data(opt)
            losses = [((p - t) ** 2).sum() for t, (p,) in enumerate(params)]
            opt.zero_grad()
            for loss in losses:
                loss.backward()
            heldout = [lambda t=t: ((params[t][0] + t) ** 2).sum() for t in range(3)]
            opt.step(losses=[loss.detach() for loss in losses], heldout=heldout)
        return [p.detach() for (p,) in params] + list(opt.initialization)

    assert_same(run(False), run(True))


# What may be given


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (nn.Linear(2, 2), "tasks: is a module"),
        ([nn.Linear(2, 2)], "task 0: is a module|is a module"),
        (nn.ModuleList([nn.Linear(2, 2)]), "is a module"),
        ([[nn.Linear(2, 2)]], "task 0, parameter '0': is a module"),
        ([nn.Linear(2, 2).state_dict()], "state_dict"),
        (nn.Linear(2, 2).state_dict(), "state_dict"),
        ([[nn.Linear(2, 2).state_dict()]], "state_dict"),
    ],
)
def test_modules_and_state_dicts_are_named(tasks, message):
    with pytest.raises(TypeError, match=message):
        ShiftingMetaOptimizer(tasks)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "a._orig_mod."]
)
def test_torchs_wrappers_leave_no_trace_in_names(prefix):
    opt = ShiftingMetaOptimizer([[(f"{prefix}weight", nn.Parameter(torch.zeros(2)))]])
    assert list(opt.initialization_state_dict()) == ["a.weight" if prefix.startswith("a") else "weight"]
    opt = ShiftingMetaOptimizer([[("module.weight", nn.Parameter(torch.zeros(2)))]])
    assert list(opt.initialization_state_dict()) == ["module.weight"]


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


INTERRUPTED = """
import copy, signal, sys, torch
from cts_fast import ShiftingMetaOptimizer
backend = sys.argv[1]
torch.set_num_threads(1)
tasks = [[torch.nn.Parameter(torch.zeros(n)) for n in (3, 50_000, 7)] for _ in range(2)]
opt = ShiftingMetaOptimizer(tasks, lr=1.0, momentum=0.5, meta_lr=0.0, horizon=None, backend=backend)
for task in tasks:
    for p in task:
        p.grad = torch.ones_like(p)
steps = interrupts = 0
theta, v, expected = 0.0, 0.0, [0.0]
for _ in range(100):  # what a parameter is after so many steps
    v = 0.5 * v + 1
    theta -= v
    expected.append(theta)
armed = False
def interrupt(*_):
    if armed:
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
start = copy.deepcopy(opt.state_dict())
while interrupts < 150:
    if opt.inner_step > 90:
        opt.load_state_dict(start)
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + (steps * 7919 % 997) * 1.2e-6)
            while opt.inner_step <= 90:
                steps += 1
                opt.step()
        finally:
            armed = False
    except KeyboardInterrupt:
        interrupts += 1
    for p in tasks[0] + tasks[1]:
        assert torch.allclose(p, torch.tensor(expected[opt.inner_step])), (opt.inner_step, p[0].item())
        assert bool(opt.state[p]["momentum_started"]) == (opt.inner_step > 0)
print(interrupts, steps)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module is not built")
def test_a_keyboard_interrupt_leaves_a_step_done_or_not():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, "cpu"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
