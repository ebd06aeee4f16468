"""A group of this process alone on NCCL: what ranks do on a GPU, without another one."""

import pytest
import torch
import torch.distributed as dist
from support.step_cases import Case, build, run, set_gradients

from cts_fast.distributed.agreement import NonFiniteOnRank
from cts_fast.engine.step import unavailable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BACKENDS = []
if torch.cuda.is_available():
    BACKENDS = [name for name in ("cuda", "triton") if not unavailable(name, torch.device("cuda"), torch.float32)]
each = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)
CASE = Case(9, ((5, 3), (1030,)), (((2,),),) * 9, steps=7, options=OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """As a program's ranks make it."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@each
def test_the_step_over_ranks_is_the_step_of_one_process(backend, group):
    for a, b in zip(run(CASE, backend, "cuda", process_group=group), run(CASE, backend, "cuda"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each
def test_a_gradient_that_is_not_finite_is_told_a_step_later(backend, group):
    opt, params = build(CASE, backend, "cuda", process_group=group, nonfinite="raise")
    for step in range(2):  # behind the first sum of a round, which waits
        set_gradients(CASE, params, step)
        if step == 1:
            params[4][1].grad[1029] = float("nan")
        opt.step()
    set_gradients(CASE, params, 2)
    with pytest.raises(NonFiniteOnRank, match="rank 0, task 4, parameter '1'"):
        opt.step()


@each
def test_steps_that_vote_are_left_out(backend, group):
    opt, params = build(CASE, backend, "cuda", process_group=group, nonfinite="skip")
    for step in range(3):
        set_gradients(CASE, params, step)
        if step == 1:
            params[0][0].grad[0] = float("inf")
        opt.step()
    assert (opt.inner_step, opt.skipped_steps) == (2, 1)


@each
def test_a_default_device_elsewhere_does_not_matter(backend, group):
    opt, params = build(CASE, backend, "cuda", process_group=group)
    set_gradients(CASE, params, 0)
    try:
        torch.set_default_device("cuda")
        for _ in range(3):
            opt.step()
    finally:
        torch.set_default_device(None)
    assert opt.round == 1
