"""Whole training steps on a GPU, by hand and with `step()`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

from benchmarks.gpu.results import hand_over
from benchmarks.gpu.variants import synchronize


def training(device: str) -> dict:
    """Whole training steps a second of eight ResNet20s at batch 128 and 32 pixels.

    The released script's form, compiled networks with torch's foreach ops, `step()`, and the whole step in a CUDA graph
    with each thing that helps it, alone and together.
    """
    import torch

    tasks, batch, side, repeats = (8, 128, 32, 30) if device == "cuda" else (2, 4, 8, 2)

    def images() -> torch.Tensor:
        return torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    x = [images() for _ in range(tasks)]
    y = [torch.randint(10, (batch,), device=device) for _ in range(tasks)]
    results, expected, began = {}, None, time.monotonic()
    for name, make in loops(x, y).items():
        if time.monotonic() - began > float(os.environ["GPU_CHECK_SECONDS"]) - 15:
            results[name] = {"left out": "no time left"}
            continue
        step, replicas = make()
        for _ in range(5):
            step()
        synchronize(device)
        values = torch.cat([p.detach().flatten().float() for net in replicas for p in net.parameters()])
        expected = values if expected is None else expected
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize(device)
            seconds.append((time.perf_counter() - start) / repeats)
        apart = float((values - expected).abs().max())
        results[name] = {"steps_per_second": 1 / statistics.median(seconds), "apart_from_first_after_5_steps": apart}
        hand_over({"loops": results})
        del step, replicas
    apart = {name: r["apart_from_first_after_5_steps"] for name, r in results.items() if "left out" not in r}
    wrong = [name for name, value in apart.items() if not value < (0.1 if "bf16" in name else 1e-2)]
    return {"loops": results, **({"error": f"other parameters after 5 steps: {', '.join(wrong)}"} if wrong else {})}


def loops(x: list, y: list) -> dict[str, Callable[[], tuple]]:
    """Name → what makes (step, nets), in the order in which they are measured. x, y: every task's batch."""
    made = {"released form, eager": partial(by_hand, x, y, "released", False)}
    if x[0].device.type == "cpu":
        return made | {"step(), torch, eager": partial(ours, x, y, "torch")}
    graphs = {f"{streams} streams": dict(streams=streams) for streams in (1, 2, 4, 8)}
    graphs["8 streams, cudnn.benchmark"] = dict(benchmark=True)
    graphs["8 streams, bf16"] = dict(bf16=True)
    graphs["8 streams, cudnn.benchmark, bf16"] = dict(benchmark=True, bf16=True)
    made |= {f"captured, {name}": partial(ours, x, y, "cuda", True, **how) for name, how in graphs.items()}
    made["captured, triton, 8 streams"] = partial(ours, x, y, "triton", True)
    made |= {f"step(), {backend}, eager": partial(ours, x, y, backend) for backend in ("cuda", "triton")}
    made["compiled + foreach"] = partial(by_hand, x, y, "foreach", True)  # the last: compiling takes half a minute
    return made


def replicas_on(device, tasks: int) -> list:
    """ResNet20s with the same weights."""
    import torch

    from cts_fast.models.resnet20 import ResNet20

    torch.manual_seed(0)
    first = ResNet20(10)
    nets = [ResNet20(10).to(device) for _ in range(tasks)]
    for net in nets:
        net.load_state_dict(first.state_dict())
    return nets


def by_hand(x: list, y: list, form: str, compiled: bool) -> tuple:
    """(step, nets) of T torch.optim.SGDs and the meta-update beside them.

    form: "released", its script's loops, or "foreach" ops.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.common.setups import SGD
    from benchmarks.common.variants import Foreach, ReleasedForm

    nets = replicas_on(x[0].device, len(x))
    torch.set_float32_matmul_precision("high")

    def eager(net, images, labels):
        return cross_entropy(net(images), labels)

    loss = torch.compile(eager) if compiled else eager
    if form == "released":
        named = [dict(net.body.named_parameters()) for net in nets]
        update = ReleasedForm.of([torch.optim.SGD(net.parameters(), foreach=False, **SGD) for net in nets], named)
    else:
        together = torch.optim.SGD([p for net in nets for p in net.parameters()], foreach=True, **SGD)
        update = Foreach.of(together, [list(net.body.parameters()) for net in nets])

    def step():
        for net, one, label in zip(nets, x, y, strict=True):
            net.zero_grad()
            loss(net, one, label).backward()
        update.step()

    return step, nets


def ours(x: list, y: list, backend: str, captured=False, *, streams=8, benchmark=False, bf16=False) -> tuple:
    """(step, nets) with ShiftingMetaOptimizer, as a CUDA graph if captured."""
    from benchmarks.common.setups import BETA, SGD
    from cts_fast import ShiftingMetaOptimizer
    from cts_fast.capture import CapturedStep
    from cts_fast.experiments.meta_train import loss as loss_in

    nets = replicas_on(x[0].device, len(x))
    loss = partial(loss_in, precision="bf16" if bf16 else "fp32")
    bodies, heads = [net.body.named_parameters() for net in nets], [net.head.parameters() for net in nets]
    options = dict(meta_lr=BETA, horizon=None, backend=backend, capturable=captured)
    opt = ShiftingMetaOptimizer(bodies, heads=heads, **options, **SGD)
    if captured:
        whole = CapturedStep(nets, opt, loss, streams=streams, benchmark=benchmark)
        batches = list(zip(x, y, strict=True))
        return lambda: whole(batches), nets

    def step():
        opt.zero_grad()
        for net, one, label in zip(nets, x, y, strict=True):
            loss(net, one, label).backward()
        opt.step()

    return step, nets
