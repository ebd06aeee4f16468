"""The Triton kernel: random steps, in its interpreter where no GPU is, its device table, and what it compiles to."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from support.step_cases import (
    Case,
    assert_as_exact_as_reference,
    assert_table_is_sent_again_only_when_it_changed,
    build,
    cases,
    run,
    set_gradients,
)

from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.step import unavailable

pytest.importorskip("triton")
kernel = pytest.importorskip("cts_fast.kernels.shifting_step")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter is slow: few cases, and no search for smaller ones
few = settings(
    max_examples=12,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)


def test_it_reads_a_param_group_in_the_order_of_its_declaration():
    names = ("LR", "MOMENTUM", "DAMPENING", "WEIGHT_DECAY", "NESTEROV", "MAXIMIZE", "META_LR", "SHIFT")
    assert {name.lower(): getattr(kernel, name).value for name in names} == {f: i for i, f in enumerate(Hyper._fields)}


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@few
@given(case=cases())
def test_random_cases_are_as_exact_as_the_reference(case):
    assert_as_exact_as_reference(case, "triton", DEVICE)


def test_the_device_table_is_sent_again_only_when_it_changed():
    case = Case(2, ((5,),), options=OPTIONS)
    opt, params = build(case, "triton", DEVICE)
    set_gradients(case, params, 0)
    assert_table_is_sent_again_only_when_it_changed(opt, params)
    table = opt.engine.backends[0].table
    version = table.table._version
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    assert table.table._version == version + 1


def test_gradients_off_their_alignment_change_no_bit():
    case = Case(5, ((1030,), (33,)), options=OPTIONS)
    assert_equal(run(case, "triton", DEVICE), run(replace(case, grad_layout="unaligned"), "triton", DEVICE))


def test_triton_says_why_it_cannot_run():
    reason = unavailable("triton", torch.device("meta"), torch.float32)
    assert "CPU tensors" in reason


VARIANTS = {
    **{f"sm_{capability}": dict(capability=capability, T=8) for capability in (80, 90, 100)},
    **{f"T = {T}": dict(capability=90, T=T) for T in (1, 3, 16, 17, 128)},
    "T = 17, bf16": dict(capability=90, T=17, dtype="bf16"),
    **{dtype: dict(capability=90, T=8, dtype=dtype) for dtype in ("fp64", "bf16", "fp16")},
    "every option": dict(capability=90, T=8, dampened=True, counting=True, nonfinite=True),
    "first half": dict(capability=90, T=8, kernel="partial_step"),
    "second half": dict(capability=90, T=8, kernel="finish_step"),
    "halves of many, bf16": dict(capability=90, T=17, dtype="bf16", kernel="partial_step"),
    "unaligned": dict(capability=90, T=8, aligned=False),
}


@pytest.fixture(scope="module")
def compiled():
    """What each variant compiles to; another process, since the interpreter of this one cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "triton_compile.py"
    command = [sys.executable, str(script), json.dumps(list(VARIANTS.values()))]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return dict(zip(VARIANTS, json.loads(out.stdout), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_one_kernel_without_spills(compiled, name):
    assert compiled[name]["entries"] == 1 and compiled[name]["stack"] == compiled[name]["local"] == 0


@pytest.mark.parametrize("name", ["T = 17", "T = 128", "T = 17, bf16"])
def test_theta_that_waits_in_memory_is_read_back_after_a_barrier(compiled, name):
    # a thread may read what another one stored: a float32 master is stored in other pieces than it is loaded
    assert compiled[name]["barriers"] == 2  # in the code of whole tiles, and of a tensor's last one


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "fp64"])
def test_full_tiles_move_16_bytes_at_a_time(compiled, name):
    widths = compiled[name]["widths"]
    assert widths["load"].count(16) >= 3 * 8 + 1  # theta, momentum and gradient of 8 tasks, and phi
    assert widths["store"].count(16) >= 2 * 8 + 1


def test_both_halves_move_16_bytes_at_a_time(compiled):
    first, second = compiled["first half"]["widths"], compiled["second half"]["widths"]
    assert first["load"].count(16) >= 3 * 8 + 1 and first["store"].count(16) >= 2 * 8 + 1
    assert second["load"].count(16) >= 8 + 2 and second["store"].count(16) >= 8 + 1


def test_unaligned_gradients_are_not_read_16_bytes_at_a_time(compiled):
    assert compiled["unaligned"]["widths"]["load"].count(16) < compiled["sm_90"]["widths"]["load"].count(16) - 8


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_registers_leave_room_for_48_kib_in_flight(compiled, name):
    blocks = 65536 // (compiled[name]["registers"] * compiled[name]["threads"])
    assert blocks * compiled[name]["threads"] * (3 * 8 + 1) * 16 >= 48 << 10
