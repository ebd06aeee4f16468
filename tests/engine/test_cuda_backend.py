"""What only the cuda backend has: a limit on param groups, and a path through device memory for large tables."""

from dataclasses import replace

import pytest
import torch
from support.step_cases import (
    Case,
    assert_as_exact_as_reference,
    assert_table_is_sent_again_only_when_it_changed,
    build,
    places,
    run,
    set_gradients,
)

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine.gradients import NonFiniteGradient
from cts_fast.engine.step import PREFERENCE

PLACES = [place for place in places() if place[0] == "cuda"]
everywhere = pytest.mark.parametrize(("backend", "device"), PLACES, ids=["-".join(place) for place in PLACES])
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)


def many_groups(device, groups):
    """One task, a parameter a group."""
    return [{"params": [torch.nn.Parameter(torch.ones(2, device=device))]} for _ in range(groups)]


@everywhere
def test_one_step_takes_as_many_groups_as_a_launch_holds(backend, device):
    opt = ShiftingMetaOptimizer(many_groups(device, 64), lr=0.5, meta_lr=0.0, backend=backend)
    for i, group in enumerate(opt.param_groups):
        group["lr"] = float(i)
        group["params"][0].grad = torch.ones_like(group["params"][0])
    opt.step()
    assert [group["params"][0][0].item() for group in opt.param_groups] == [1.0 - i for i in range(64)]


@everywhere
def test_more_groups_than_a_launch_holds_go_to_the_next_backend_unless_cuda_was_asked_for(backend, device, monkeypatch):
    monkeypatch.setitem(PREFERENCE, device, PREFERENCE["cuda"])
    opt = ShiftingMetaOptimizer(many_groups(device, 64))
    assert opt.backend == "cuda"
    opt.add_param_group(many_groups(device, 1)[0])
    assert opt.backend in ("triton", "torch")
    with pytest.raises(RuntimeError, match="up to 64 param groups, not 65"):
        ShiftingMetaOptimizer(many_groups(device, 65), backend="cuda")
    asked = ShiftingMetaOptimizer(many_groups(device, 64), backend="cuda")
    with pytest.raises(RuntimeError, match="up to 64 param groups, not 65"):
        asked.add_param_group(many_groups(device, 1)[0])
    assert len(asked.param_groups) == 64


@everywhere
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("tasks", "missing"), [(30, {(0, 1, 3), (1, 29, 120)}), (32, ())], ids=["general", "lean"])
def test_a_table_that_no_launch_holds_goes_through_device_memory(backend, device, capturable, tasks, missing):
    shapes, heads = ((3,), (130,)) * 60, (((2,),),) * tasks
    case = Case(tasks, shapes, heads, steps=2, missing=frozenset(missing), options=OPTIONS)
    if not capturable:
        assert_as_exact_as_reference(case, backend, device)
        return
    opt, _ = build(case, backend, device, capturable=True)
    assert opt.engine.backends[0].table is not None
    for a, b in zip(run(case, backend, device), run(case, backend, device, capturable=True), strict=True):
        assert torch.equal(a, b)


@everywhere
def test_a_large_table_is_sent_again_only_when_it_changed(backend, device):
    case = Case(30, ((1,),) * 110, options=OPTIONS)
    opt, params = build(case, backend, device)
    set_gradients(case, params, 0)
    assert_table_is_sent_again_only_when_it_changed(opt, params)


@everywhere
def test_gradients_off_their_alignment_change_no_bit(backend, device):
    case = Case(5, ((1030,), (33,)), options=OPTIONS)
    aligned, off = run(case, backend, device), run(replace(case, grad_layout="unaligned"), backend, device)
    assert all(torch.equal(a, b) for a, b in zip(aligned, off, strict=True))


@everywhere
@pytest.mark.parametrize("tasks", [8, 12, 16, 24])  # in one thread; in uneven slices, and in those of 8
def test_lean_kernels_are_captured_and_flag_what_is_not_finite(backend, device, tasks):
    case = Case(tasks, ((130,), (5,)), (((3,),),) * tasks, steps=4, options=OPTIONS)
    assert_as_exact_as_reference(case, backend, device)
    expected = run(case, backend, device)
    for more in ({"capturable": True}, {"nonfinite": "raise"}):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(case, backend, device, **more), strict=True))
    opt, params = build(case, backend, device, nonfinite="raise")
    set_gradients(case, params, 0)
    params[tasks - 2][0].grad[129] = float("nan")
    with pytest.raises(NonFiniteGradient, match=f"task {tasks - 2}, parameter '0'"):
        opt.step()
        opt.state_dict()  # a GPU tells of it later
