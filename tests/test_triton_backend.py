"""The Triton kernel: the step in its interpreter where no GPU is, steps that the device counts, and what it compiles to."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from step_cases import Case, assert_as_exact_as_reference, build, cases, result, run, set_gradients

from cts_fast import ShiftingMetaOptimizer, ops

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter is slow: few cases, and no search for smaller ones
few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)


def counted(case: Case, device_counts: bool, before_step=lambda opt, step: None, **more):
    """A case's optimizer after its steps, and what its buffers hold."""
    opt, params = build(case, "triton", DEVICE, capturable=device_counts, **more)
    assert opt._counting is device_counts
    for step in range(case.steps):
        set_gradients(case, params, step)
        before_step(opt, step)
        opt.step()
    return opt, params, result(opt)


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@few
@given(case=cases())
def test_random_cases_are_as_exact_as_the_reference(case):
    assert_as_exact_as_reference(case, "triton", DEVICE)


@few
@given(case=cases())
def test_a_step_that_the_device_counts_is_the_step_that_the_host_decides(case):
    host, _, expected = counted(case, False)
    device, _, got = counted(case, True)
    assert_equal(expected, got)
    assert (host.inner_step, host.round, host.meta_updates) == (device.inner_step, device.round, device.meta_updates)
    for a, b in zip(host._flats, device._flats, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.started, y.started.cpu())


def test_a_tensor_learning_rate_is_read_by_the_device():
    case = Case(3, ((9,), (4,)), (((2,),),) * 3, steps=4, options={**OPTIONS, "lr": 0.1})
    rates = [0.1, 0.2, 0.05, 0.4]

    def as_number(opt, step):
        for group in opt.param_groups:
            group["lr"], group["meta_lr"] = torch.tensor(rates[step]).item(), rates[step]

    def as_tensor(opt, step):
        for group in opt.param_groups:
            if step == 0:
                group["lr"] = torch.tensor(rates[0], device=DEVICE)
                group["meta_lr"] = torch.tensor(rates[0], device=DEVICE, dtype=torch.float64)
            group["lr"].fill_(rates[step])
            group["meta_lr"].fill_(rates[step])

    assert_equal(counted(case, False, as_number)[2], counted(case, True, as_tensor)[2])


def test_a_learning_rate_tensor_of_another_dtype_is_refused():
    case = Case(2, ((3,),), options={**OPTIONS, "lr": torch.tensor(0.1, dtype=torch.float16, device=DEVICE)})
    opt, params = build(case, "triton", DEVICE, capturable=True)
    set_gradients(case, params, 0)
    with pytest.raises(ValueError, match="float32 or float64"):
        opt.step()


def test_the_device_reads_the_gradient_scale_and_found_inf():
    case = Case(3, ((9,),), steps=4, options=OPTIONS)

    def scaled(opt, step):
        opt.grad_scale, opt.found_inf = torch.tensor([4.0], device=DEVICE), torch.tensor([float(step == 1)], device=DEVICE)

    host, _, expected = counted(case, False, scaled)
    device, _, got = counted(case, True, scaled)
    assert_equal(expected, got)
    assert host.inner_step == device.inner_step == 0 and host.round == device.round == 1  # one of four steps left out, K = 3


def test_the_device_skips_steps_with_a_gradient_that_is_not_finite():
    case = Case(2, ((5,), (3,)), (((2,),),) * 2, steps=3, options=OPTIONS)

    def poisoned(opt, step):
        if step == 1:
            opt.param_groups[0]["params"][1].grad[0] = float("nan")

    host, _, expected = counted(case, False, poisoned, nonfinite="skip")
    device, _, got = counted(case, True, poisoned, nonfinite="skip")
    assert_equal(expected, got)
    assert host.skipped_steps == device.skipped_steps == 1 and device.inner_step == 2


@pytest.mark.parametrize("device_counts", [False, True])
def test_a_gradient_that_is_not_finite_is_reported_by_task_and_parameter(device_counts):
    case = Case(2, ((5,), (600,)), options=OPTIONS)
    opt, params = build(case, "triton", DEVICE, capturable=device_counts, nonfinite="raise")
    set_gradients(case, params, 0)
    params[1][1].grad[599] = float("-inf")
    with pytest.raises(RuntimeError, match="task 1, parameter '1'"):
        opt.step()
        opt.state_dict()
    assert opt.inner_step == 1
    opt.state_dict()  # reported once


def test_several_dtypes_advance_the_counters_once():
    def params(dtype):
        return [torch.nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE)) for _ in range(2)]

    both = [list(pair) for pair in zip(params(torch.float32), params(torch.float64), strict=True)]
    opt = ShiftingMetaOptimizer(both, lr=0.1, horizon=2, backend="triton", capturable=True)
    for _ in range(3):
        for pair in both:
            for p in pair:
                p.grad = torch.ones_like(p)
        opt.step()
    assert (opt.inner_step, opt.round, opt.meta_updates) == (1, 1, 3)


def test_a_counted_state_loads_into_an_optimizer_that_goes_on_equally():
    case = Case(3, ((9,),), steps=6, options={**OPTIONS, "dampening": 0.5})
    _, _, expected = counted(case, True)
    first, params = build(case, "triton", DEVICE, capturable=True)
    for step in range(2):
        set_gradients(case, params, step)
        first.step()
    second, params = build(replace(case, seed=1), "triton", DEVICE, capturable=True)
    second.load_state_dict(first.state_dict())
    for step in range(2, 6):
        set_gradients(case, params, step)
        second.step()
    assert_equal(expected, result(second))


def test_the_device_table_is_sent_again_only_when_it_changed():
    case = Case(2, ((5,),), options=OPTIONS)
    opt, params = build(case, "triton", DEVICE)
    set_gradients(case, params, 0)
    opt.step()
    (launcher,) = opt._launchers
    version = launcher.table._version
    opt.step()
    assert launcher.table._version == version
    params[0][0].grad = params[0][0].grad.clone()
    opt.step()
    assert launcher.table._version == version + 1
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    assert launcher.table._version == version + 2


def test_gradients_off_their_alignment_change_no_bit():
    case = Case(5, ((1030,), (33,)), options=OPTIONS)
    assert_equal(run(case, "triton", DEVICE), run(replace(case, grad_layout="unaligned"), "triton", DEVICE))


def test_triton_says_why_it_cannot_run():
    reason = ops.unavailable("triton", torch.device("meta"), torch.float32)
    assert "CPU tensors" in reason


VARIANTS = {
    **{f"sm_{capability}": dict(capability=capability, T=8) for capability in (80, 90, 100)},
    **{f"T = {T}": dict(capability=90, T=T) for T in (1, 3, 16, 17)},
    **{dtype: dict(capability=90, T=8, dtype=dtype) for dtype in ("fp64", "bf16", "fp16")},
    "every option": dict(capability=90, T=8, dampened=True, counting=True, nonfinite=True),
    "unaligned": dict(capability=90, T=8, aligned=False),
}


@pytest.fixture(scope="module")
def compiled():
    """What each variant compiles to; another process, since the interpreter of this one cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    out = subprocess.run(
        [sys.executable, str(script), json.dumps(list(VARIANTS.values()))], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return dict(zip(VARIANTS, json.loads(out.stdout), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_one_kernel_without_spills(compiled, name):
    assert compiled[name]["entries"] == 1 and compiled[name]["stack"] == compiled[name]["local"] == 0


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "fp64"])
def test_full_tiles_move_16_bytes_at_a_time(compiled, name):
    widths = compiled[name]["widths"]
    assert widths["load"].count(16) >= 3 * 8 + 1  # theta, momentum and gradient of 8 tasks, and phi
    assert widths["store"].count(16) >= 2 * 8 + 1


def test_unaligned_gradients_are_not_read_16_bytes_at_a_time(compiled):
    assert compiled["unaligned"]["widths"]["load"].count(16) < compiled["sm_90"]["widths"]["load"].count(16) - 8


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_registers_leave_room_for_48_kib_in_flight(compiled, name):
    blocks = 65536 // (compiled[name]["registers"] * compiled[name]["threads"])
    assert blocks * compiled[name]["threads"] * (3 * 8 + 1) * 16 >= 48 << 10
