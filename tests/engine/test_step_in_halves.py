"""The step in two halves, which ranks take, on every backend that runs here: in a group of this process alone."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, assume, given, settings
from support.ranks import init
from support.step_cases import Case, assert_as_exact_as_reference, cases, many_sizes, places, run

QUICK = [place for place in places() if place[0] != "triton"]
everywhere = pytest.mark.parametrize(("backend", "device"), places(), ids=["-".join(place) for place in places()])
quickly = pytest.mark.parametrize(("backend", "device"), QUICK, ids=["-".join(place) for place in QUICK])
QUIET = dict(deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A group of one rank."""
    init(0, 1, str(tmp_path_factory.mktemp("group") / "store"))
    yield dist.group.WORLD
    dist.destroy_process_group()


def assume_gradients(case: Case) -> None:
    """Every step has one: over ranks a step without any counts, alone it does not."""
    sizes = [len(case.shapes) + (len(case.heads[t]) if case.heads else 0) for t in range(case.tasks)]
    for step in range(case.steps):
        assume(any((step, t, i) not in case.missing for t, size in enumerate(sizes) for i in range(size)))


@quickly
@settings(max_examples=60, **QUIET)
@given(case=cases())
def test_two_halves_are_as_exact_as_the_reference_step(backend, device, case):
    assume_gradients(case)
    assert_as_exact_as_reference(case, backend, device, process_group=dist.group.WORLD)


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate], **QUIET)
@given(case=cases())
@pytest.mark.skipif(("triton", "cpu") not in places(), reason="Triton's interpreter does not run here")
def test_two_halves_in_triton_are_as_exact_as_the_reference_step(case):
    assume_gradients(case)
    assert_as_exact_as_reference(case, "triton", process_group=dist.group.WORLD)


@everywhere
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 9, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_two_halves_of_any_number_of_tasks_and_odd_sizes(backend, device, tasks, dtype):
    horizon = 2 if tasks < 16 else 1
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=horizon)
    case = Case(tasks, *many_sizes(tasks), dtype, horizon + 1, options=options)
    assert_as_exact_as_reference(case, backend, device, process_group=dist.group.WORLD)


@everywhere
def test_two_halves_are_bit_equal_to_the_reference_in_float64_without_fused_operations(backend, device):
    options = dict(lr=0.5, momentum=0.5, meta_lr=0.25, horizon=3)  # powers of two: no operation rounds
    case = Case(4, ((5, 3), (7,)), heads=(((2,),),) * 4, dtype=torch.float64, steps=7, options=options)
    mine, theirs = run(case, backend, device, process_group=dist.group.WORLD), run(case, "reference")
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
