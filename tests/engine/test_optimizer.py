"""`step` of `ShiftingMetaOptimizer` beside the rest of torch: closures, hooks, scalers, clipping, compilation."""

import pytest
import torch
from support.nets import assert_same, backward, make_nets, make_optimizer, train, values
from support.step_cases import Case, build, places, run
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine.gradients import PythonTable
from cts_fast.engine.step import unavailable


def test_the_closure_runs_once_with_gradients_and_its_value_comes_back():
    nets = make_nets()
    opt = make_optimizer(nets)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        backward(nets)
        return 7.0

    with torch.no_grad():
        assert opt.step(closure) == 7.0
    assert calls == [True] and opt.inner_step == 1


def test_step_hooks_run_around_the_step():
    nets = make_nets()
    opt = make_optimizer(nets)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o.inner_step)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o.inner_step)))
    backward(nets)
    opt.step()
    assert seen == [("before", 0), ("after", 1)]


def test_hooks_of_a_subclass_with_its_own_step_run_once():
    class Printing(ShiftingMetaOptimizer):
        def step(self, closure=None):
            return super().step(closure)

    nets, seen = make_nets(), []
    opt = Printing([net[:2].parameters() for net in nets])
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args, o.inner_step)))
    backward(nets)
    opt.step()
    assert seen == [((opt,), 1)]


def test_hooks_of_all_optimizers_and_the_profiler_see_the_step():
    nets, seen = make_nets(), []
    opt = make_optimizer(nets)
    backward(nets)
    handle = register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(type(o)))
    try:
        opt.step()
    finally:
        handle.remove()
    assert seen == [ShiftingMetaOptimizer]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#ShiftingMetaOptimizer.step" in {event.key for event in profile.key_averages()}


def test_without_any_gradient_nothing_changes_counters_included():
    nets = make_nets()
    opt = make_optimizer(nets)
    before = values(nets, opt)
    opt.step()
    assert_same(before, values(nets, opt))
    assert (opt.inner_step, opt.meta_updates) == (0, 0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    nets = make_nets()
    opt = make_optimizer(nets)
    backward(nets)
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for group in opt.param_groups for p in group["params"]]
    assert all(g is None if set_to_none else not g.any() for g in grads)
    backward(nets, 1)
    opt.step()
    assert opt.inner_step == 2


def test_clip_grad_norm_works_on_groups_and_per_task():
    nets = make_nets()
    opt = make_optimizer(nets)
    backward(nets)
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.01)
    assert sum(p.grad.norm() ** 2 for p in opt.param_groups[0]["params"]).sqrt() <= 0.0101
    for net in nets:
        nn.utils.clip_grad_norm_(net.parameters(), 0.001)
    opt.step()
    assert opt.inner_step == 1


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_grad_scaler_unscales_in_the_step_and_skips_infinite_ones(backend):
    nets, twins = make_nets(), make_nets()
    opt, other = make_optimizer(nets, backend=backend), make_optimizer(twins, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))  # creates the scale
    for step in range(3):
        opt.zero_grad()
        backward(nets, step, scale=64.0)
        scaler.step(opt)
        scaler.update()
        other.zero_grad()
        backward(twins, step)
        other.step()
    for a, b in zip(values(nets, opt), values(twins, other), strict=True):
        torch.testing.assert_close(a, b)
    before, counters = values(nets, opt), (opt.inner_step, opt.round, opt.meta_updates)
    opt.zero_grad()
    backward(nets, 5, scale=float("inf"))
    scaler.step(opt)
    assert_same(before, values(nets, opt))
    assert counters == (opt.inner_step, opt.round, opt.meta_updates)


def test_nonfinite_raise_names_task_and_parameter():
    nets = make_nets()
    opt = make_optimizer(nets, nonfinite="raise")
    backward(nets)
    nets[1][1].weight.grad[2] = float("nan")
    with pytest.raises(RuntimeError, match="task 1, parameter '1.weight'"):
        opt.step()
    assert opt.inner_step == 1  # it was applied


def test_nonfinite_skip_leaves_everything_and_counts():
    nets = make_nets()
    opt = make_optimizer(nets, nonfinite="skip")
    backward(nets)
    nets[2][4].bias.grad[0] = float("inf")  # a head
    before = values(nets, opt)
    opt.step()
    assert_same(before, values(nets, opt))
    assert (opt.skipped_steps, opt.inner_step) == (1, 0)
    train(nets, opt, 1)
    assert (opt.skipped_steps, opt.inner_step) == (1, 1)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_graph_that_saved_a_parameter_notices_the_step(backend):
    if unavailable(backend, torch.device("cpu"), torch.float32):
        pytest.skip(f"backend {backend} is off")
    nets = make_nets()
    opt = make_optimizer(nets, backend=backend)
    backward(nets)
    loss = (nets[0][0].weight ** 2).sum() + (opt.initialization[0] * nets[0][0].weight).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_exchanged_by_the_user_are_taken_over():
    nets = make_nets()
    opt = make_optimizer(nets, lr=0.0, meta_lr=0.0)
    fresh = torch.full_like(nets[1][0].weight, 2.0)
    nets[1][0].weight.data = fresh
    backward(nets)
    opt.step()
    assert (nets[1][0].weight == 2).all() and (opt.state[nets[1][0].weight]["theta"] == 2).all()
    assert nets[1][0].weight.data_ptr() != fresh.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_parameter_transposed_in_place_keeps_its_values(backend):
    params = [[nn.Parameter(torch.arange(9.0).view(3, 3))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=0.0, meta_lr=0.0, backend=backend)
    params[1][0].data = params[1][0].data.t()
    params[1][0].grad = torch.ones(3, 3)
    opt.step()
    expected = torch.arange(9.0).view(3, 3).t()
    assert torch.equal(params[1][0], expected) and torch.equal(opt.state[params[1][0]]["theta"], expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_gradient_that_torch_negates_lazily_is_read_negated(backend):
    params = [nn.Parameter(torch.tensor(1.0))]
    opt = ShiftingMetaOptimizer(params, lr=1.0, meta_lr=0.0, backend=backend)
    torch.complex(torch.tensor(1.0), params[0]).conj().mul(1j).real.backward()  # real(i (1 - i p)) = p
    assert params[0].grad.is_neg() and params[0].grad.item() == 1.0
    opt.step()
    assert params[0].item() == 0.0


def test_a_cast_after_construction_raises_and_says_what_to_do():
    nets = make_nets()
    opt = make_optimizer(nets)
    nets[2].double()
    with pytest.raises(ValueError, match="task 2, parameter '0.weight'.*before making the optimizer"):
        backward(nets[2:])
        opt.step()


def test_step_inside_torch_compile_is_a_graph_break_with_the_same_result():
    nets, twins = make_nets(2), make_nets(2)
    opt, other = make_optimizer(nets), make_optimizer(twins)
    torch._dynamo.reset()
    compiled = torch.compile(opt.step, backend="eager")

    @torch.compile(backend="eager")
    def training_step(scale):
        opt.step()
        return scale * 2

    for step in range(4):
        compiled_step = compiled if step % 2 else lambda: training_step(torch.ones(1))
        for these, own, act in ((nets, opt, compiled_step), (twins, other, other.step)):
            own.zero_grad()
            backward(these, step)
            act()
    assert_same(values(nets, opt), values(twins, other))


def test_gradients_are_found_in_python_where_torch_has_no_c_functions_for_them(monkeypatch):
    options = dict(lr=0.1, momentum=0.9, meta_lr=0.3, horizon=3)
    case = Case(3, ((5, 3), (7,)), (((2,),),) * 3, missing=frozenset({(1, 0, 0)}), options=options)
    for backend in {place[0] for place in places() if place[1] == "cpu"} | {"reference"}:
        expected = run(case, backend)
        with monkeypatch.context() as patch:
            patch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
            opt, _ = build(case, backend)
            assert isinstance(opt.engine.collectors[0].table, PythonTable)
            assert all(torch.equal(a, b) for a, b in zip(expected, run(case, backend), strict=True))
