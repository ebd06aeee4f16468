"""What methods do beside the step: the native ops against torch's, for every instruction set and number of threads."""

import pytest
import torch
from support.step_cases import Case, build, set_gradients

from cts_fast.engine.backends.method_ops import MethodOps, PathPoint
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper

_cpu = pytest.importorskip("cts_fast._cpu", reason="the native module is not built")

SHAPES = ((129,), (3, 5, 3, 3), (), (0, 4), (1,), (2, 4100))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = dict(lr=0.1, momentum=0.9, meta_lr=0.3)
KEY = 0xFEDCBA9876543210
HYPER = Hyper(0.1, 0.9, 0.0, 0.0, False, False, 0.3, 1.0)


def end_round(total: bool, gradients: bool, weight: float, reset: bool):
    """`end_round_` with a sum, with gradients, or with both."""

    def act(ops, x):
        given = x["total"] if total else None, x["gradients"] if gradients else None
        return ops.end_round_(*given, weight, [0.7, 9.0], reset)

    return act


def measured_step(ops, x):
    return ops.measured_step_(x["gradients"], [HYPER, HYPER], Control(True, False, False, x["tasks"]))


def path_step(weight_of, change_of, scale: float, keeps: bool):
    """`path_step_` at a point where a segment of task t ends with weight_of(t) and change_of(t); None: at the first."""

    def act(ops, x):
        segment = [[] if of is None else [of(t) for t in range(x["tasks"])] for of in (weight_of, change_of)]
        point = PathPoint(x["total"], x["theta"], x["gradient"], *segment, scale, keeps)
        ops.path_step_(point, x["gradients"], [HYPER, HYPER], Control(False, False, True, x["tasks"]))

    return act


OPS = {
    "add_gradients_": lambda ops, x: ops.add_gradients_(x["total"], x["gradients"], 0.3),
    "end_round_": end_round(True, True, 0.3, True),
    "end_round_ with gradients alone": end_round(False, True, 0.3, False),
    "end_round_ with a sum alone": end_round(True, False, 0.0, True),
    "reset_": lambda ops, x: ops.reset_(True),
    "reset_, momentum kept": lambda ops, x: ops.reset_(False),
    "squared_distances": lambda ops, x: ops.squared_distances(x["theta"]),
    "measured_step_": measured_step,
    "measured_step_, all gradients there": measured_step,
    "add_signs_": lambda ops, x: ops.add_signs_(KEY, 5, 0.01),
    "path_step_, the first point": path_step(None, None, 0.5, True),
    "path_step_": path_step(lambda t: 0.5 + t, lambda t: 0.1 * t - 0.2, 0.5, True),
    "path_step_, the last point": path_step(lambda t: 1.0, lambda t: 0.3, 1.0, False),
}
every_op = pytest.mark.parametrize("name", OPS)


def taken(name, dtype=torch.float64, tasks=3, native=True, threads=2):
    """All buffers after an operation, in float64, and what it returned.

    Some gradients are missing but for one operation; one lies in another memory order.
    """
    missing = frozenset() if "all gradients" in name else frozenset({(1, 0, 0), (1, tasks - 1, 5)})
    case = Case(tasks, SHAPES, heads=(((3,),),) * tasks, dtype=dtype, missing=missing, options=OPTIONS)
    opt, params = build(case, "cpu")
    for step in (0, 1):
        set_gradients(case, params, step)
        if step == 0:
            opt.step()
    params[-1][1].grad = params[-1][1].grad.transpose(0, 1).contiguous().transpose(0, 1)
    (backend,), (collect,) = opt.engine.backends, opt.engine.collectors
    flat = backend.flats[0]
    draw = torch.Generator().manual_seed(1)
    x = {"gradients": collect(), "tasks": tasks, "total": torch.zeros_like(flat.phi)}
    x |= {name: torch.zeros(flat.rows, flat.columns, dtype=flat.work_dtype) for name in ("theta", "gradient")}
    for buffer in (x["total"][None], x["theta"], x["gradient"]):
        for part in flat.parts(buffer):
            part.copy_(torch.randn(part.shape, generator=draw))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        returned = OPS[name](backend if native else InTorch(backend), x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(flat.theta, flat.work_theta.to(flat.dtype))
    buffers = [flat.phi, flat.work_theta, flat.momentum, flat.started, x["total"]]
    buffers += [x["theta"], x["gradient"]] if name != "path_step_, the last point" else []  # not read again
    return [b.double().clone() for b in buffers] + [torch.tensor(returned or 0.0, dtype=torch.float64)]


class InTorch(MethodOps):
    """Torch's ops beside the native step of the same buffers."""

    def __init__(self, backend):
        self.backend, self.flats = backend, backend.flats

    def step_(self, *args):
        self.backend.step_(*args)


@every_op
@pytest.mark.parametrize("tasks", [1, 3, 5, 8])
@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_native_ops_do_what_torch_does(monkeypatch, name, tasks, isa):
    monkeypatch.setenv("CTS_FAST_ISA", isa)
    torch.testing.assert_close(taken(name, tasks=tasks), taken(name, tasks=tasks, native=False), rtol=1e-12, atol=1e-12)


@every_op
@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_native_ops_do_what_torch_does_in_low_precision(monkeypatch, name, dtype, isa):
    monkeypatch.setenv("CTS_FAST_ISA", isa)
    torch.testing.assert_close(taken(name, dtype), taken(name, dtype, native=False), rtol=2e-5, atol=2e-5)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(name, dtype):
    one = taken(name, dtype, threads=1)
    for threads in (2, 5):
        for a, b in zip(one, taken(name, dtype, threads=threads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_of_one_number_tells_theta_from_phi(dtype):
    case = Case(3, SHAPES, heads=(((3,),),) * 3, dtype=dtype, options=OPTIONS)
    opt, _ = build(case, "cpu")
    ((backend, flat),) = opt.engine.shared
    bits = torch.int64 if flat.work_dtype == torch.float64 else torch.int32
    opt.load_initialization([torch.zeros_like(phi) for phi in opt.initialization])
    assert backend.is_at_phi() and flat.is_at_phi()
    for segment in flat.segments:
        for place in {segment.offset, segment.offset + segment.numel - 1} if segment.numel else ():
            for row in range(flat.rows):
                number = flat.work_theta[row].view(bits)[place : place + 1]
                for bit in (0, bits.itemsize * 8 - 1):  # the smallest number above 0, and −0
                    number ^= torch.ones(1, dtype=bits) << bit
                    assert not backend.is_at_phi() and not flat.is_at_phi()
                    number.zero_()
    assert backend.is_at_phi() and flat.is_at_phi()
