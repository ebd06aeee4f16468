"""Random step problems, and how to run one on any backend.

Gradients are drawn, not computed, so only the step's arithmetic counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine.step import BACKENDS, unavailable

CPU = torch.device("cpu")


def places() -> list[tuple[str, str]]:
    """(backend, device) pairs that run here; "reference" is the oracle and tested on its own."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        (name, device)
        for name in BACKENDS
        for device in devices
        if name != "reference" and unavailable(name, torch.device(device), torch.float32) is None
    ]


@dataclass
class Case:
    tasks: int = 3
    shapes: tuple = ((5, 3), (7,))
    heads: tuple = ()  # shapes of each task's head; a task without an entry has none
    dtype: torch.dtype = torch.float32
    steps: int = 5
    seed: int = 0
    missing: frozenset = frozenset()  # (step, task, index of the parameter, heads after the shared ones)
    layout: str = "contiguous"  # of parameters
    grad_layout: str = "same"
    options: dict = field(default_factory=lambda: {"lr": 0.1})


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy of the values in another memory layout."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    if layout == "channels_last" and values.dim() == 4:
        return values.clone(memory_format=torch.channels_last)
    if layout == "sliced" and values.dim() >= 1:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "unaligned":
        room = values.new_full((values.numel() + 2,), float("nan"))
        inner = room[1:-1].view(values.shape)
        inner.copy_(values)
        return inner
    return values.clone()


def many_sizes(tasks: int) -> tuple[tuple, tuple]:
    """(shapes, heads) of odd sizes, 0-dim and empty ones; of many tasks fewer, which interpreters are slow on."""
    shapes = ((129,), (0, 4), (), (3, 5, 3, 3), (1,), (1030,))
    every = max(1, tasks // 8)
    return shapes[: 6 if tasks < 32 else 2], tuple(((t % 5 + 1, 3),) * (t % every == 0) for t in range(tasks))


def parameters(case: Case, device="cpu", dtype: torch.dtype | None = None) -> tuple[list[list], list[list]]:
    """(shared parameters, heads) of each task; every task starts at the first one's values."""
    draw = torch.Generator().manual_seed(case.seed)
    start = [torch.randn(shape, generator=draw).to(case.dtype) for shape in case.shapes]
    own = [[torch.randn(shape, generator=draw).to(case.dtype) for shape in shapes] for shapes in case.heads]

    def parameter(values: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(laid_out(values.to(device, dtype or case.dtype), case.layout))

    shared = [[parameter(values) for values in start] for _ in range(case.tasks)]
    heads = [[parameter(values) for values in own[t]] if t < len(own) else [] for t in range(case.tasks)]
    return shared, heads


def build(case: Case, backend: str, device="cpu", dtype: torch.dtype | None = None, cls=ShiftingMetaOptimizer, **more):
    """(optimizer, parameters of each task, shared ones first)."""
    shared, heads = parameters(case, device, dtype)
    opt = cls(shared, **case.options, heads=heads if case.heads else None, backend=backend, **more)
    return opt, [a + b for a, b in zip(shared, heads, strict=True)]


def set_gradients(case: Case, params: list[list[Tensor]], step: int, first: int = 0) -> None:
    """The drawn gradients of one step: the same values for every backend and dtype. first: of these tasks among all."""
    for t, task in enumerate(params, first):
        for i, param in enumerate(task):
            draw = torch.Generator().manual_seed(case.seed * 1_000_003 + step * 10_007 + t * 101 + i)
            values = torch.randn(param.shape, generator=draw).to(case.dtype).to(param.device, param.dtype)
            param.grad = None if (step, t, i) in case.missing else laid_out(values, case.grad_layout)


def result(opt: ShiftingMetaOptimizer) -> list[Tensor]:
    """phi, then theta and momentum of every parameter, in float64 on the CPU."""
    states = [opt.state[param] for group in opt.param_groups for param in group["params"]]
    tensors = [*opt.initialization, *(s["theta"] for s in states), *(s["momentum_buffer"] for s in states)]
    return [tensor.detach().double().cpu() for tensor in tensors]


def run(case: Case, backend: str, device: str = "cpu", dtype: torch.dtype | None = None, **more) -> list[Tensor]:
    """What the buffers hold after the case's steps."""
    opt, params = build(case, backend, device, dtype, **more)
    for step in range(case.steps):
        set_gradients(case, params, step)
        opt.step()
    return result(opt)


def oracle(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's result in float64 and in the case's dtype; kept, since each backend asks for the same one."""
    key = repr(case)
    if key not in _oracles:
        _oracles[key] = run(case, "reference", dtype=torch.float64), run(case, "reference")
        if len(_oracles) > 4:
            del _oracles[next(iter(_oracles))]
    return _oracles[key]


_oracles: dict[str, tuple[list[Tensor], list[Tensor]]] = {}


def assert_as_exact_as_reference(case: Case, backend: str, device: str = "cpu", **more) -> None:
    """|out − ref64| ≤ 2 |ref − ref64| + a few units in the last place, coordinate by coordinate.

    ref is the reference in the case's dtype, ref64 in float64. more: options of the backend's optimizer. Where momentum
    of low precision was rounded the other way than ref's, θ and φ of that coordinate may be some lr times that apart.
    """
    exact, reference = oracle(case)
    out = run(case, backend, device, **more)
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    low = torch.finfo(case.dtype).eps
    names = [f"phi[{i}]" for i in range(len(case.shapes))]
    count = (len(out) - len(names)) // 2
    names += [f"{kind}[{i}]" for kind in ("theta", "momentum") for i in range(count)]
    apart = momentum_apart(case, out[-count:], reference[-count:])
    for name, o, r, e, v in zip(names, out, reference, exact, apart, strict=True):
        unit = low if name.startswith("momentum") else eps
        scale = e.abs().max() if e.numel() else torch.tensor(0.0)
        bound = 2 * (r - e).abs() + 8 * case.steps * unit * (scale + 1) + 4 * case.options["lr"] * v
        wrong = ((o - e).abs() > bound) | o.isnan()
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            found = f"{o[at]:.9g}, exact {e[at]:.9g}, reference {r[at]:.9g}"
            raise AssertionError(f"{backend} on {device}: {name}{list(at)} is {found}; {case}")


def momentum_apart(case: Case, momentum: list[Tensor], other: list[Tensor]) -> list[Tensor | float]:
    """By how much two momenta of low precision differ, for each tensor of `result`: of one shared, in any task."""
    if case.dtype.itemsize > 2:
        return [0.0] * (len(case.shapes) + 2 * len(momentum))
    apart = [(a - b).abs() for a, b in zip(momentum, other, strict=True)]
    names, shared = len(case.shapes), len(case.shapes) * case.tasks
    largest: list = [torch.stack(apart[n:shared:names]).amax(0) for n in range(names)]
    return [*largest, *largest * case.tasks, *apart[shared:], *[0.0] * len(apart)]


def assert_is_torch_sgd(case: Case, backend: str) -> None:
    """Without meta-learning every task follows a torch.optim.SGD of its own, bit for bit."""
    sgd = {name: case.options[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    case = replace(case, options={**sgd, "meta_lr": 0.0, "horizon": None})
    opt, params = build(case, backend)
    twins = [[torch.nn.Parameter(p.detach().clone()) for p in task] for task in params]
    sgds = [torch.optim.SGD(task, **sgd) for task in twins]
    for step in range(case.steps):
        set_gradients(case, params, step)
        set_gradients(case, twins, step)
        opt.step()
        for one in sgds:
            one.step()
    for task, twin in zip(params, twins, strict=True):
        for p, q in zip(task, twin, strict=True):
            assert torch.equal(p, q)


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)
SHARED_SHAPES = st.one_of(SHAPES, st.sampled_from([(129,), (1,), (16, 8), (), (300,)]))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "channels_last"])
GRAD_LAYOUTS = st.sampled_from(["same", "same", "transposed", "sliced", "unaligned"])


@st.composite
def hyper_parameters(draw) -> dict:
    """The optimizer's options, over everything the step offers."""
    momentum = draw(st.sampled_from([0.0, 0.9, 0.5]))
    nesterov = momentum > 0 and draw(st.booleans())
    return dict(
        lr=draw(st.sampled_from([0.1, 0.01, 0.0])),
        momentum=momentum,
        nesterov=nesterov,
        dampening=0.0 if nesterov else draw(st.sampled_from([0.0, 0.3, 1.0])),
        weight_decay=draw(st.sampled_from([0.0, 5e-4, 0.1])),
        maximize=draw(st.booleans()),
        meta_lr=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        shift=draw(st.sampled_from([1.0, 0.0, 0.3])),
        horizon=draw(st.sampled_from([None, 1, 2, 3])),
        meta_interval=draw(st.sampled_from([1, 1, 2, 3])),
        reset_momentum=draw(st.booleans()),
    )


@st.composite
def cases(draw) -> Case:
    """Cases over everything the step offers."""
    tasks = draw(st.sampled_from([1, 2, 3, 4, 8, 9, 16, 17]))
    shapes = tuple(draw(st.lists(SHARED_SHAPES, min_size=1, max_size=4)))
    heads = tuple(tuple(draw(st.lists(SHAPES, max_size=2))) for _ in range(tasks)) if draw(st.booleans()) else ()
    if not any(heads):
        heads = ()
    steps = draw(st.integers(1, 6))
    sizes = [len(shapes) + (len(heads[t]) if heads else 0) for t in range(tasks)]
    everything = [(s, t, i) for s in range(steps) for t in range(tasks) for i in range(sizes[t])]
    some = st.sets(st.sampled_from(everything), max_size=len(everything))
    missing = frozenset(draw(some)) if draw(st.booleans()) else frozenset()
    options = draw(hyper_parameters())
    dtype, seed = draw(DTYPES), draw(st.integers(0, 1000))
    layouts = {"layout": draw(LAYOUTS), "grad_layout": draw(GRAD_LAYOUTS)}
    return Case(tasks, shapes, heads, dtype, steps, seed, missing, **layouts, options=options)


def assert_table_is_sent_again_only_when_it_changed(opt, params):
    """Steps an optimizer whose kernel reads the gradients' addresses from a device table.

    params: [T][N], with gradients.
    """
    opt.step()
    (backend,) = opt.engine.backends
    version = backend.table.table._version
    opt.step()
    assert backend.table.table._version == version
    params[-1][0].grad = params[-1][0].grad.clone()
    opt.step()
    assert backend.table.table._version == version + 1
