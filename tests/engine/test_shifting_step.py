"""The step itself, on every backend that runs here. Oracle: the reference equations in float64."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.step_cases import (
    Case,
    assert_as_exact_as_reference,
    assert_is_torch_sgd,
    build,
    cases,
    many_sizes,
    places,
    result,
    run,
    set_gradients,
)

from cts_fast import ShiftingMetaOptimizer

PLACES = places()
# Triton's interpreter is slow: tests/engine/test_triton_backend.py gives it fewer random cases
QUICK = [place for place in PLACES if place != ("triton", "cpu")]
REFERENCE = [("reference", "cpu")]


def at(chosen):
    """Runs a test at each of these (backend, device) pairs."""
    return pytest.mark.parametrize(("backend", "device"), chosen, ids=["-".join(place) for place in chosen])


everywhere, everywhere_and_reference = at(PLACES), at(PLACES + REFERENCE)
quickly, quickly_and_reference = at(QUICK), at(QUICK + REFERENCE)
relaxed = settings(
    max_examples=int(os.environ.get("CTS_FAST_EXAMPLES", 100)),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@quickly
@relaxed
@given(case=cases())
def test_every_backend_is_as_exact_as_the_reference(backend, device, case):
    assert_as_exact_as_reference(case, backend, device)


@everywhere
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 9, 16, 17, 32, 128, 133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_tasks_and_odd_sizes(backend, device, tasks, dtype):
    horizon = 2 if tasks < 16 else 1  # interpreters are slow: a reset, and a step after it
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=horizon)
    shapes, heads = many_sizes(tasks)
    assert_as_exact_as_reference(Case(tasks, shapes, heads, dtype, horizon + 1, options=options), backend, device)


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("grad_layout", ["same", "transposed", "sliced", "unaligned"])
def test_any_layout_of_parameters_and_gradients(backend, device, layout, grad_layout):
    options = dict(lr=0.1, momentum=0.9, dampening=0.2, meta_lr=0.3, horizon=None)
    case = Case(3, ((4, 6, 3, 3), (5, 7), (3,)), layout=layout, grad_layout=grad_layout, options=options)
    assert_as_exact_as_reference(case, backend, device)


@relaxed
@given(case=cases())
def test_without_meta_learning_the_reference_is_torch_sgd_bit_for_bit(case):
    assert_is_torch_sgd(replace(case, dtype=torch.float32), "reference")


@everywhere_and_reference
def test_one_step_by_hand(backend, device):
    # two tasks from 1; gradients 1 and 3, lr 1: θ = 0 and −2; mean −1; Δ = 0.5 (−1 − 1) = −1; φ = 0; θ = −1 and −3
    params = [[torch.nn.Parameter(torch.ones(1, dtype=torch.float64, device=device))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, meta_lr=0.5, backend=backend)
    params[0][0].grad, params[1][0].grad = (torch.tensor([g], dtype=torch.float64, device=device) for g in (1.0, 3.0))
    opt.step()
    assert [opt.initialization[0].item(), params[0][0].item(), params[1][0].item()] == [0.0, -1.0, -3.0]


@quickly_and_reference
@relaxed
@given(case=cases())
def test_the_shift_changes_no_offset_from_phi(backend, device, case):
    options = {**case.options, "horizon": None, "meta_interval": 1, "shift": 1.0}
    case = replace(case, dtype=torch.float64, steps=1)
    moved = run(replace(case, options={**options, "meta_lr": 0.4}), backend, device)
    still = run(replace(case, options={**options, "meta_lr": 0.0}), backend, device)
    n = len(case.shapes)
    for i in range(n):
        for t in range(case.tasks):
            theta = n + t * n + i  # its place in the results
            torch.testing.assert_close(moved[theta] - moved[i], still[theta] - still[i])


@quickly_and_reference
@relaxed
@given(case=cases(), data=st.data())
def test_permuting_tasks_permutes_the_result(backend, device, case, data):
    case = replace(case, dtype=torch.float64, heads=(), missing=frozenset())
    order = data.draw(st.permutations(range(case.tasks)))
    opt, params = build(case, backend, device)
    other, permuted = build(case, backend, device)
    for step in range(case.steps):
        set_gradients(case, params, step)
        for t, source in enumerate(order):
            for mine, theirs in zip(permuted[t], params[source], strict=True):
                mine.grad = theirs.grad.clone()
        opt.step()
        other.step()
    for a, b in zip(opt.initialization, other.initialization, strict=True):
        torch.testing.assert_close(a, b)
    for t, source in enumerate(order):
        for mine, theirs in zip(permuted[t], params[source], strict=True):
            torch.testing.assert_close(mine, theirs)


@everywhere_and_reference
def test_two_runs_are_bit_equal(backend, device):
    case = Case(7, ((513,), (4, 3)), heads=(((3,),),) * 7, options=dict(lr=0.1, momentum=0.9, meta_lr=0.3, horizon=3))
    assert all(torch.equal(a, b) for a, b in zip(run(case, backend, device), run(case, backend, device), strict=True))


@everywhere_and_reference
def test_an_exploding_task_touches_no_other_task_without_meta_learning(backend, device):
    case = Case(3, ((5,),), options=dict(lr=0.1, meta_lr=0.0, horizon=None))
    opt, params = build(case, backend, device)
    set_gradients(case, params, 0)
    params[1][0].grad.fill_(float("inf"))
    opt.step()
    assert params[0][0].isfinite().all() and params[2][0].isfinite().all() and opt.initialization[0].isfinite().all()


@everywhere_and_reference
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_without_weight_decay_an_infinite_parameter_is_no_nan(backend, device, value):
    # every column, so that wide accesses and the tensor's last numbers are among them
    params = [[torch.nn.Parameter(torch.full((37,), value, device=device))] for _ in range(3)]
    opt = ShiftingMetaOptimizer(params, lr=0.1, momentum=0.9, weight_decay=0.0, meta_lr=0.0, backend=backend)
    for (param,) in params:
        param.grad = torch.ones_like(param)
    opt.step()
    for (param,) in params:
        assert (param == value).all() and (opt.state[param]["momentum_buffer"] == 1).all()


@everywhere_and_reference
def test_reset_puts_every_task_at_phi_and_clears_momentum(backend, device):
    case = Case(3, ((5, 3),), heads=(((2,),),) * 3, steps=3, options=dict(lr=0.1, momentum=0.9, meta_lr=0.3, horizon=3))
    opt, params = build(case, backend, device)
    for step in range(3):
        set_gradients(case, params, step)
        opt.step()
    assert (opt.inner_step, opt.round, opt.meta_updates) == (0, 1, 3)
    for task in params:
        assert torch.equal(task[0].detach(), opt.initialization[0])
        assert not opt.state[task[0]]["momentum_buffer"].any()
        assert opt.state[task[1]]["momentum_buffer"].any()  # heads go on


@everywhere_and_reference
def test_reset_may_keep_momentum(backend, device):
    case = Case(2, ((5,),), steps=2, options=dict(lr=0.1, momentum=0.9, horizon=2, reset_momentum=False))
    opt, params = build(case, backend, device)
    for step in range(2):
        set_gradients(case, params, step)
        opt.step()
    assert opt.round == 1 and all(opt.state[task[0]]["momentum_buffer"].all() for task in params)


@everywhere_and_reference
def test_meta_updates_come_at_multiples_of_the_interval_and_leftover_steps_are_dropped(backend, device):
    case = Case(2, ((5,),), options=dict(lr=0.1, meta_lr=0.5, horizon=5, meta_interval=2))
    opt, params = build(case, backend, device)
    phis = [opt.initialization[0].clone()]
    for step in range(5):
        set_gradients(case, params, step)
        opt.step()
        phis.append(opt.initialization[0].clone())
    changed = [not torch.equal(a, b) for a, b in zip(phis, phis[1:], strict=False)]
    assert changed == [False, True, False, True, False] and opt.meta_updates == 2
    assert torch.equal(params[0][0].detach(), phis[-1])


@everywhere_and_reference
def test_reptile_is_a_meta_interval_of_the_horizon(backend, device):
    options = dict(lr=0.1, momentum=0.9, meta_lr=0.7, horizon=4, meta_interval=4)
    case = Case(3, ((6,),), dtype=torch.float64, options=options)
    opt, params = build(case, backend, device)
    start = params[0][0].detach().clone()
    twins = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    sgds = [torch.optim.SGD([twin], lr=0.1, momentum=0.9) for twin in twins]
    for step in range(4):
        set_gradients(case, params, step)
        set_gradients(case, [[twin] for twin in twins], step)
        opt.step()
        for sgd in sgds:
            sgd.step()
    expected = start + 0.7 * (torch.stack(list(twins)).mean(0) - start)
    torch.testing.assert_close(opt.initialization[0], expected.detach())


@everywhere_and_reference
def test_quadratic_tasks_follow_the_closed_form(backend, device):
    # losses h/2 (θ − c_t)²; offsets δ_t = θ_t − φ obey δ ← δ − αh(φ + δ − c_t), φ ← φ + β mean δ
    h, lr, beta, centres = 0.7, 0.2, 0.1, torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    params = [[torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))] for _ in centres]
    opt = ShiftingMetaOptimizer(params, lr=lr, meta_lr=beta, horizon=50, backend=backend)
    phi, delta = 0.0, torch.zeros(3, dtype=torch.float64)
    for step in range(120):
        for centre, (param,) in zip(centres, params, strict=True):
            param.grad = h * (param.detach() - centre.item())
        opt.step()
        delta = delta - lr * h * (phi + delta - centres)
        phi = phi + beta * delta.mean().item()
        if (step + 1) % 50 == 0:
            delta.zero_()
    assert opt.initialization[0].item() == pytest.approx(phi, abs=1e-12)


@everywhere_and_reference
def test_a_parameter_without_gradient_still_takes_part_in_mean_and_shift(backend, device):
    params = [[torch.nn.Parameter(torch.ones(2, device=device))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, momentum=0.5, meta_lr=1.0, backend=backend)
    params[0][0].grad = torch.ones(2, device=device)
    opt.step()  # θ = 0 and 1, mean 0.5, Δ = −0.5
    assert params[0][0].tolist() == [-0.5, -0.5]
    assert params[1][0].tolist() == opt.initialization[0].tolist() == [0.5, 0.5]


@everywhere_and_reference
def test_the_first_gradient_of_a_momentum_buffer_is_undamped(backend, device):
    params = [[torch.nn.Parameter(torch.zeros(1, device=device))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, momentum=0.5, dampening=1.0, meta_lr=0.0, horizon=2, backend=backend)
    one = torch.ones(1, device=device)
    params[0][0].grad = one.clone()
    opt.step()  # task 0: first gradient, v = 1
    params[1][0].grad = one.clone()
    opt.step()  # task 0: v = 0.5; task 1: first gradient, v = 1; then the reset clears both
    assert [opt.state[p]["momentum_started"].item() for (p,) in params] == [0, 0]
    opt.step()
    assert [opt.state[p]["momentum_buffer"].item() for (p,) in params] == [1.0, 1.0]


@everywhere_and_reference
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_are_the_rounded_master(backend, device, dtype):
    case = Case(3, ((129,),), dtype=dtype, steps=20, options=dict(lr=1e-3, momentum=0.9, meta_lr=0.01))
    opt, params = build(case, backend, device)
    for step in range(20):
        set_gradients(case, params, step)
        opt.step()
    for (param,) in params:
        state = opt.state[param]
        assert state["theta"].dtype == torch.float32 and state["momentum_buffer"].dtype == dtype
        assert torch.equal(state["theta"].to(dtype), param.detach())
    assert opt.initialization[0].dtype == torch.float32


@everywhere_and_reference
def test_what_a_user_writes_to_a_low_precision_parameter_counts(backend, device):
    case = Case(2, ((9,),), dtype=torch.bfloat16, options=dict(lr=0.0, meta_lr=0.0))
    opt, params = build(case, backend, device)
    params[0][0].data.fill_(3.0)
    set_gradients(case, params, 0)
    opt.step()
    assert (opt.state[params[0][0]]["theta"] == 3).all() and (params[0][0] == 3).all()


@everywhere_and_reference
def test_gradients_are_only_read(backend, device):
    options = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True)
    case = Case(3, ((33,), (4, 5)), grad_layout="unaligned", options=options)
    opt, params = build(case, backend, device)
    set_gradients(case, params, 0)
    before = copy.deepcopy([p.grad for task in params for p in task])
    opt.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, [p for task in params for p in task], strict=True))


@everywhere_and_reference
def test_mixed_dtypes_and_groups_step_together(backend, device):
    draw, dtypes = torch.Generator().manual_seed(0), (torch.float32, torch.bfloat16, torch.float64)
    first = [torch.nn.Parameter(torch.randn(5, generator=draw).to(device, dtype)) for dtype in dtypes]
    nets = [[torch.nn.Parameter(p.detach().clone()) for p in first] for _ in range(3)]
    learning = {"params": [n[:2] for n in nets], "lr": 0.1}
    without_meta = {"params": [n[2:] for n in nets], "lr": 0.2, "meta_lr": 0.0}
    opt = ShiftingMetaOptimizer([learning, without_meta], meta_lr=0.5, backend=backend)
    for n in nets:
        for p in n:
            p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(nets[0][0].detach(), first[0].detach() - 0.1 - 0.05)
    torch.testing.assert_close(nets[0][2].detach(), first[2].detach() - 0.2)
    assert torch.equal(opt.initialization[2], first[2].detach())


def test_the_torch_backend_takes_large_tensors_in_blocks():
    options = dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, meta_lr=0.3, horizon=2)
    case = Case(4, ((300_001,), (7,)), steps=3, missing=frozenset({(1, 2, 0)}), options=options)
    assert_as_exact_as_reference(case, "torch")


def test_results_hold_phi_theta_and_momentum():
    opt, params = build(Case(2, ((3,),)), "reference")
    assert [tuple(t.shape) for t in result(opt)] == [(3,)] * 5
