"""The native CPU step: every instruction set, any number of threads, and not a byte beside its own."""

import ctypes
import itertools
import mmap
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
    result,
    run,
    set_gradients,
)

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine import gradients as gradients_module

_cpu = pytest.importorskip("cts_fast._cpu", reason="the native module is not built")

ISAS = _cpu.instruction_sets()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=3)
SHAPES = ((129,), (3, 5, 3, 3), (), (0, 4), (1,), (1030,))
every_isa = pytest.mark.parametrize("isa", ISAS)
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
EXAMPLES = int(os.environ.get("CTS_FAST_EXAMPLES", 100))
relaxed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=CHECKS, print_blob=True)


@pytest.fixture
def use_isa(monkeypatch):
    """Makes optimizers built from now on use one instruction set."""
    return lambda isa: monkeypatch.setenv("CTS_FAST_ISA", isa)


def run_with_threads(case: Case, threads: int) -> list[torch.Tensor]:
    """`run` on the cpu backend with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(case, "cpu")
    finally:
        torch.set_num_threads(before)


def assert_same_bits(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(*(x.view(torch.int64) if x.dim() else x for x in (one, other)))


@every_isa
@relaxed
@given(case=cases())
def test_every_instruction_set_is_as_exact_as_the_reference(isa, use_isa, case):
    use_isa(isa)
    assert_as_exact_as_reference(case, "cpu")


@every_isa
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16, 17, 33, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_takes_any_number_of_tasks(isa, use_isa, tasks, dtype):
    use_isa(isa)
    heads = tuple(((t % 5 + 1, 3),) for t in range(tasks))
    everything = itertools.product(range(4), range(tasks), range(7))
    missing = frozenset(one for one in everything if sum(one) % 5 == 0)
    assert_as_exact_as_reference(Case(tasks, SHAPES, heads, dtype, 4, missing=missing, options=OPTIONS), "cpu")


@every_isa
@pytest.mark.parametrize("tasks", [1, 2, 5, 8, 9, 16, 24, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_many_tiles_meet_at_every_border(isa, use_isa, tasks, dtype):
    use_isa(isa)
    shapes = ((3, 2049), (1,), (512,), (9, 513), (4096,))
    missing = frozenset({(1, 0, 0), (1, tasks - 1, 3)})
    assert_as_exact_as_reference(Case(tasks, shapes, dtype=dtype, steps=3, missing=missing, options=OPTIONS), "cpu")


@pytest.mark.parametrize("tasks", [1, 8, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(tasks, dtype):
    case = Case(tasks, ((40_000,), (129, 31), (7,)), dtype=dtype, options=OPTIONS)
    one = run_with_threads(case, 1)
    for threads in (1, 2, 5):
        assert_same_bits(one, run_with_threads(case, threads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.skipif(ISAS[0] == "plain", reason="torch rounds a * b + c once where the machine can, this kernel never")
@relaxed
@given(case=cases())
def test_without_meta_learning_tasks_are_torch_sgd_bit_for_bit(dtype, case):
    assert_is_torch_sgd(replace(case, dtype=dtype), "cpu")


@every_isa
def test_sixteen_bit_values_round_as_torch_rounds_them(isa, use_isa):
    use_isa(isa)
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        every = every[every.isfinite()]
        param = torch.nn.Parameter(torch.zeros_like(every))
        opt = ShiftingMetaOptimizer([[param]], lr=1.0, momentum=1e-30, meta_lr=0.0, backend="cpu")
        param.grad = every.clone()
        opt.step()  # momentum = every, theta = −every: read, widened, narrowed and stored without loss
        assert torch.equal(opt.state[param]["momentum_buffer"], every)
        assert torch.equal(param, -every)
        # theta = −scale · every in float32, and its rounding, ties and overflow included
        for scale in (1 / 3, 1e-4, 1.7, 900.0):
            param = torch.nn.Parameter(torch.zeros_like(every))
            opt = ShiftingMetaOptimizer([[param]], lr=scale, meta_lr=0.0, backend="cpu")
            param.grad = every.clone()
            opt.step()
            assert torch.equal(param, opt.state[param]["theta"].to(dtype))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 3, 17, 64, 129])
def test_nothing_is_read_or_written_behind_a_gradient(isa, use_isa, dtype, numel):
    use_isa(isa)
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    at = page - numel * dtype.itemsize  # the gradient ends where the page ends
    gradient = torch.frombuffer(pages, dtype=dtype, count=numel, offset=at)
    gradient.fill_(0.5)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start), page, mmap.PROT_READ) == 0
    assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    params = [torch.nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(3)]
    opt = ShiftingMetaOptimizer([[param] for param in params], lr=1.0, meta_lr=0.0, backend="cpu")
    for param in params:
        param.grad = gradient
    opt.step()
    assert all(bool((param == 0.5).all()) for param in params)


@every_isa
@relaxed
@given(case=cases())
def test_padding_between_segments_stays_zero(isa, use_isa, case):
    use_isa(isa)
    opt, params = build(case, "cpu")
    for step in range(case.steps):
        set_gradients(case, params, step)
        opt.step()
    for flat in (flat for flats in opt.engine.flats for flat in flats):
        inside = torch.zeros(flat.columns, dtype=torch.bool)
        for segment in flat.segments:
            inside[segment.offset : segment.offset + segment.numel] = True
        for buffer in (flat.theta, flat.momentum, flat.master, None if flat.phi is None else flat.phi[None]):
            assert buffer is None or not buffer[:, ~inside].any()


KINDS = {  # of step
    "meta-update": {},
    "inner step alone": {"meta_interval": 100},
    "reset": {"horizon": 1},
    "nesterov": {"nesterov": True},
    "no momentum": {"momentum": 0.0},
    "rates of 0": {"lr": 0.0, "meta_lr": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 8, 17])
def test_one_nonfinite_gradient_anywhere_is_reported(kind, dtype, tasks):
    def shared_and_head():
        return [[torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (7, 37, 12)] for _ in range(tasks)]

    options = {"lr": 0.1, "momentum": 0.9, "backend": "cpu", **KINDS[kind]}
    for bad in (float("nan"), float("inf"), -float("inf")):
        for i, at in ((0, 3), (1, 0), (1, 36), (2, -1)):  # the last one is the head's
            for mode in ("raise", "skip"):
                params = shared_and_head()
                opt = ShiftingMetaOptimizer(
                    [task[:2] for task in params], heads=[task[2:] for task in params], nonfinite=mode, **options
                )
                for task in params:
                    for param in task:
                        param.grad = torch.full_like(param, torch.finfo(dtype).max)  # what follows from it may overflow
                opt.step()
                params[tasks // 2][i].grad[at] = bad
                if mode == "skip":
                    before = [param.clone() for task in params for param in task]
                    opt.step()
                    assert opt.skipped_steps == 1
                    assert all(map(torch.equal, before, (param for task in params for param in task)))
                    continue
                with pytest.raises(RuntimeError, match=f"task {tasks // 2}, parameter '{('0', '1', 'head.0')[i]}'"):
                    opt.step()


def test_an_instruction_set_that_is_not_there_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("CTS_FAST_ISA", "sse9")
    with pytest.raises(RuntimeError, match="CTS_FAST_ISA='sse9'; this machine has"):
        ShiftingMetaOptimizer([[torch.nn.Parameter(torch.ones(2))]], backend="cpu")


def odd_gradients() -> tuple[ShiftingMetaOptimizer, list[list[torch.nn.Parameter]]]:
    """An optimizer whose gradients are of every kind that is not refused."""
    shapes = ((4, 6), (1, 5), (0, 3), (), (3,), (2, 2))
    params = [[torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, meta_lr=0.1, backend="cpu")
    for task in params:
        for i, param in enumerate(task):
            param.grad = torch.full_like(param, float(i + 1))
    params[0][0].grad = torch.arange(24.0).view(6, 4).T
    params[0][1].grad = torch.arange(5.0).view(5, 1).T  # the stride of a dimension of size 1 means nothing
    params[1][4].grad = torch.ones(1).expand(3)
    params[1][5].grad = None
    params[1][0].data = torch.full((4, 6), 3.0)
    return opt, params


def test_gradients_are_collected_alike_in_c_and_in_python(monkeypatch):
    native, native_params = odd_gradients()
    assert type(native.engine.collectors[0].table).__name__ == "GradientTable"
    monkeypatch.setattr(gradients_module, "GradientTable", None)
    plain, plain_params = odd_gradients()
    for _ in range(2):
        mine, theirs = native.engine.collectors[0](), plain.engine.collectors[0]()
        assert mine.present == theirs.present == 11
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
        native.step(), plain.step()
    assert_same_bits(result(native), result(plain))
    assert native_params[0][0].data_ptr() == native.engine.collectors[0].addresses[0]
    assert plain_params[1][5].grad is None


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_refused_gradients_name_task_and_parameter_and_nothing_moves(kind):
    params = [[torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, backend="cpu")
    for task in params:
        for param in task:
            param.grad = torch.ones_like(param)
    if kind == "sparse":
        params[1][1].grad = torch.eye(2).to_sparse()
    else:
        params[1][1].grad_dtype = None
        params[1][1].grad = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="task 1, parameter '1': gradient is"):
        opt.step()
    assert all(bool((param == 1).all()) for task in params for param in task) and opt.inner_step == 0


def test_gradients_are_released_after_the_step():
    import weakref

    param = torch.nn.Parameter(torch.ones(3))
    opt = ShiftingMetaOptimizer([[param]], backend="cpu")
    param.grad = torch.ones(3)
    storage = weakref.ref(param.grad.untyped_storage())
    opt.step()
    opt.zero_grad()
    assert storage() is None


@relaxed
@given(numel=st.integers(1, 5000), tasks=st.integers(1, 20), block=st.integers(1, 3))
def test_a_task_without_gradients_is_moved_by_the_shift_alone(numel, tasks, block):
    params = [[torch.nn.Parameter(torch.arange(float(numel * block)))] for _ in range(tasks)]
    opt = ShiftingMetaOptimizer(params, lr=1.0, meta_lr=1.0, backend="cpu")
    start = params[0][0].detach().clone()
    params[0][0].grad = torch.full((numel * block,), float(tasks))
    opt.step()
    # one task of T moved by −T: the mean, and with it phi and every other task, by −1
    assert torch.equal(opt.initialization[0], start - 1)
    assert all(torch.equal(task[0], start - 1) for task in params[1:])
