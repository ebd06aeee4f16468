"""Host time of a step: what `step()` takes beyond the native call, with fresh gradients and with the same again."""

from __future__ import annotations

import gc
from time import perf_counter

import torch

from benchmarks.common.measure import paired_difference, summary
from benchmarks.common.setups import BETA, SGD
from benchmarks.common.variants import native_call
from benchmarks.cpu.ceiling import CacheFlush
from cts_fast import ShiftingMetaOptimizer
from cts_fast.models.resnet20 import ResNet20


def resnet20_tasks(tasks: int, **options) -> tuple[list[ResNet20], ShiftingMetaOptimizer]:
    """T ResNet20s with heads, 59 parameter tensors each, and the optimizer over them."""
    nets = [ResNet20(10) for _ in range(tasks)]
    for net in nets[1:]:
        net.body.load_state_dict(nets[0].body.state_dict())
    bodies, heads = [net.body.named_parameters() for net in nets], [net.head.parameters() for net in nets]
    optimizer = ShiftingMetaOptimizer(bodies, heads=heads, meta_lr=BETA, horizon=None, **SGD, **options)
    return nets, optimizer


def host_time(backend: str, repeats: int, flush: CacheFlush, tasks: int = 8) -> dict[str, dict[str, float]]:
    """Milliseconds of the native call and of `step()` for eight ResNet20s with heads, and the paired differences.

    Gradients come from real backward passes (tiny images), so "fresh" ones are tensors that Python has not seen yet.
    All three runs of a repeat find cold caches; a fourth and fifth, warm, follow, each after an untimed one.
    """
    nets, optimizer = resnet20_tasks(tasks, backend=backend)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run, cold: bool) -> None:
        if cold:
            flush()
        start = perf_counter()
        run()
        seconds.setdefault(name, []).append(perf_counter() - start)

    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            optimizer.zero_grad()
            for net in nets:
                net(images).square().sum().backward()
            timed("step, fresh gradients", optimizer.step, cold=True)
            timed("step, same gradients", optimizer.step, cold=True)
            call = native_call(optimizer)
            timed("native call", call, cold=True)
            optimizer.step()
            timed("step, same gradients, warm", optimizer.step, cold=False)
            call()
            timed("native call, warm", call, cold=False)
    finally:
        gc.enable()
    rows = {name: summary(times[1:]) for name, times in seconds.items()}
    bases = {name: "native call" for name in ("step, fresh gradients", "step, same gradients")}
    for name, base in {**bases, "step, same gradients, warm": "native call, warm"}.items():
        rows[name]["host_ms"] = 1e3 * paired_difference(seconds[name][1:], seconds[base][1:])
    return {"gradients": sum(len(group["params"]) for group in optimizer.param_groups), "rows": rows}
