"""Steps whose decisions the device takes (`capturable=True`), on every backend that can.

They are what a CUDA graph replays, here run eagerly.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from support.step_cases import Case, build, cases, places, result, set_gradients

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine.step import counts_on_device

PLACES = [place for place in places() if counts_on_device(place[:1])]
everywhere = pytest.mark.parametrize(("backend", "device"), PLACES, ids=["-".join(place) for place in PLACES])
# an interpreter is slow: few cases, and no search for smaller ones
few = settings(
    max_examples=int(os.environ.get("CTS_FAST_EXAMPLES", 12)),
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)


def counted(case: Case, backend: str, device: str, on_device: bool, before_step=lambda opt, step: None, **more):
    """A case's optimizer after its steps, and what its buffers hold."""
    opt, params = build(case, backend, device, capturable=on_device, **more)
    assert opt.engine.counting is on_device
    for step in range(case.steps):
        set_gradients(case, params, step)
        before_step(opt, step)
        opt.step()
    return opt, result(opt)


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@everywhere
@few
@given(case=cases())
def test_a_step_that_the_device_counts_is_the_step_that_the_host_decides(backend, device, case):
    host, expected = counted(case, backend, device, False)
    counts, got = counted(case, backend, device, True)
    assert_equal(expected, got)
    assert (host.inner_step, host.round, host.meta_updates) == (counts.inner_step, counts.round, counts.meta_updates)
    for a, b in zip(host.engine.flats, counts.engine.flats, strict=True):
        for x, y in zip(a, b, strict=True):
            not_empty = [segment.numel > 0 for segment in x.segments]
            assert torch.equal(x.started[not_empty], y.started.cpu()[not_empty])


@everywhere
def test_a_tensor_learning_rate_is_read_by_the_device(backend, device):
    case = Case(3, ((9,), (4,)), (((2,),),) * 3, steps=4, options=OPTIONS)
    rates = [0.1, 0.2, 0.05, 0.4]

    def as_number(opt, step):
        for group in opt.param_groups:
            group["lr"], group["meta_lr"] = torch.tensor(rates[step]).item(), rates[step]

    def as_tensor(opt, step):
        for group in opt.param_groups:
            if step == 0:
                group["lr"] = torch.tensor(rates[0], device=device)
                group["meta_lr"] = torch.tensor(rates[0], device=device, dtype=torch.float64)
            group["lr"].fill_(rates[step])
            group["meta_lr"].fill_(rates[step])

    _, expected = counted(case, backend, device, False, as_number)
    _, got = counted(case, backend, device, True, as_tensor)
    assert_equal(expected, got)


@everywhere
def test_a_learning_rate_tensor_of_another_dtype_is_refused(backend, device):
    case = Case(2, ((3,),), options={**OPTIONS, "lr": torch.tensor(0.1, dtype=torch.float16, device=device)})
    opt, params = build(case, backend, device, capturable=True)
    set_gradients(case, params, 0)
    with pytest.raises(ValueError, match="float32 or float64"):
        opt.step()


@everywhere
def test_the_device_reads_the_gradient_scale_and_found_inf(backend, device):
    case = Case(3, ((9,),), steps=4, options=OPTIONS)

    def scaled(opt, step):
        opt.grad_scale = torch.tensor([4.0], device=device)
        opt.found_inf = torch.tensor([float(step == 1)], device=device)

    host, expected = counted(case, backend, device, False, scaled)
    counts, got = counted(case, backend, device, True, scaled)
    assert_equal(expected, got)
    # one of four steps left out, K = 3
    assert host.inner_step == counts.inner_step == 0 and host.round == counts.round == 1


@everywhere
def test_the_device_skips_steps_with_a_gradient_that_is_not_finite(backend, device):
    case = Case(2, ((5,), (3,)), (((2,),),) * 2, steps=3, options=OPTIONS)

    def poisoned(opt, step):
        if step == 1:
            opt.param_groups[0]["params"][1].grad[0] = float("nan")

    host, expected = counted(case, backend, device, False, poisoned, nonfinite="skip")
    counts, got = counted(case, backend, device, True, poisoned, nonfinite="skip")
    assert_equal(expected, got)
    assert host.skipped_steps == counts.skipped_steps == 1 and counts.inner_step == 2


@everywhere
@pytest.mark.parametrize("on_device", [False, True])
def test_a_gradient_that_is_not_finite_is_reported_by_task_and_parameter(backend, device, on_device):
    case = Case(2, ((5,), (600,)), options=OPTIONS)
    opt, params = build(case, backend, device, capturable=on_device, nonfinite="raise")
    set_gradients(case, params, 0)
    params[1][1].grad[599] = float("-inf")
    with pytest.raises(RuntimeError, match="task 1, parameter '1'"):
        opt.step()
        opt.state_dict()
    assert opt.inner_step == 1
    opt.state_dict()  # reported once


@everywhere
def test_weights_loaded_after_the_construction_are_the_new_initialization(backend, device):
    opt, params = build(
        Case(2, ((5,),), options={**OPTIONS, "lr": 0.0, "horizon": None}), backend, device, capturable=True
    )
    for task in params:
        task[0].data.fill_(3.0)
        task[0].grad = torch.ones_like(task[0])
    opt.step()
    opt.step()
    assert opt.initialization[0].eq(3).all() and all(task[0].eq(3).all() for task in params)


@everywhere
def test_a_momentum_given_as_a_tensor_counts_by_its_value(backend, device):
    def as_tensor(opt, step):
        for group in opt.param_groups:
            group["momentum"] = torch.tensor(0.5, device=device)

    case = Case(2, ((9,),), steps=3, options={**OPTIONS, "momentum": 0.5})
    _, expected = counted(case, backend, device, True)
    _, got = counted(case, backend, device, True, as_tensor)
    assert_equal(expected, got)


@everywhere
def test_empty_gradients_alone_are_finite(backend, device):
    opt, params = build(Case(2, ((0,),), options=OPTIONS), backend, device, capturable=True, nonfinite="skip")
    for task in params:
        task[0].grad = torch.zeros_like(task[0])
    opt.step()
    assert (opt.inner_step, opt.skipped_steps) == (1, 0)


@everywhere
def test_several_dtypes_advance_the_counters_once(backend, device):
    def params(dtype):
        return [torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device)) for _ in range(2)]

    both = [list(pair) for pair in zip(params(torch.float32), params(torch.float64), strict=True)]
    opt = ShiftingMetaOptimizer(both, lr=0.1, horizon=2, backend=backend, capturable=True)
    for _ in range(3):
        for pair in both:
            for p in pair:
                p.grad = torch.ones_like(p)
        opt.step()
    assert (opt.inner_step, opt.round, opt.meta_updates) == (1, 1, 3)


@everywhere
def test_a_counted_state_loads_into_an_optimizer_that_goes_on_equally(backend, device):
    case = Case(3, ((9,),), steps=6, options={**OPTIONS, "dampening": 0.5})
    _, expected = counted(case, backend, device, True)
    first, params = build(case, backend, device, capturable=True)
    for step in range(2):
        set_gradients(case, params, step)
        first.step()
    second, params = build(replace(case, seed=1), backend, device, capturable=True)
    second.load_state_dict(first.state_dict())
    for step in range(2, 6):
        set_gradients(case, params, step)
        second.step()
    assert_equal(expected, result(second))
