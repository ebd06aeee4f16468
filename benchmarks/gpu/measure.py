"""What check.py measures: launches of a step, its time, the device's copy bandwidth, and whole training steps."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial


def so_far(result: dict) -> None:
    """Hand what a section knows by now to the process that waits for it, in case it gets no further."""
    print("\nRESULT " + json.dumps(result), flush=True)


# Launches ------------------------------------------------------------------------------------------------------------------------


def counts(device: str) -> dict:
    """Kernels, copies, memsets and waits of one step with unchanged gradients, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps, results = 3, {}  # the naive loop makes thousands of events a step, which take the profiler seconds
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for name, make in variants(device).items():
        if name in ("compiled unrolled + copy", "step(), cuda, captured"):
            continue
        variant = make(problem("resnet20", 8 if device == "cuda" else 2, device))
        for _ in range(3):
            variant.step()
        synchronize(device)
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                variant.step()
            synchronize(device)
        events = [
            e for e in profiler.events() if not e.is_user_annotation
        ]  # what a label of the host spans on the device is no launch
        on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        host = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU]
        results[name] = {
            "kernels": sum(not re.search("Memcpy|Memset", n) for n in on_device) / steps,
            "copies": sum("Memcpy" in n for n in on_device) / steps,
            "memsets": sum("Memset" in n for n in on_device) / steps,
            # not cudaDeviceSynchronize: the profiler and this function call it
            "waits": sum(n in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy") for n in host) / steps,
            "host ops": sum(n.startswith("aten::") for n in host) / steps,
        }
        del variant
        so_far({"steps": results})
    return {"steps": results}


# Time ----------------------------------------------------------------------------------------------------------------------------


def bandwidth(device: str) -> dict:
    """Bytes read and written per second by a large copy within the device's memory."""
    import torch

    numbers = (1 << 30) if device == "cuda" else 1 << 22  # 4 GiB of float32
    a, b = (torch.randn(numbers, device=device) for _ in range(2))
    seconds = timed(lambda: b.copy_(a), device, 15)
    return {
        "bytes_per_second": 2 * 4 * numbers / statistics.median(seconds),
        "seconds": statistics.median(seconds),
        "bytes": 8 * numbers,
    }


def steps(device: str) -> dict:
    """One step's device and host time, ours on all networks first; every variant is checked on the first two."""
    from benchmarks.common.variants import check

    began, rows, kinds = time.monotonic(), [], variants(device)
    ours = [name for name in kinds if name.startswith("step()") and "torch" not in name]
    theirs = [name for name in kinds if name not in ours]
    main = [("resnet20", 8), ("resnet18", 8)]
    more = [("resnet20", tasks) for tasks in (16, 32, 128, 1, 2, 4)] + [("resnet50", 8), ("gpt124m", 8)]
    plan = [
        (problem, name)
        for problems, names in ((main, ours), (more, ours), (main, theirs))
        for problem in problems
        for name in names
    ]
    plan += [
        (problem, name)
        for problem in [("resnet20", 32), ("resnet50", 8), ("gpt124m", 8)]
        for name in ("foreach", "fused + foreach")
    ]
    if device == "cpu":
        plan = [(("resnet20", 2), name) for name in kinds]
    else:
        import torch

        rows.append(
            {
                "network": "none",
                "tasks": 0,
                "variant": "an empty kernel",
                **measure(lambda: torch.cuda._sleep(0), device),
            }
        )
    for (network, tasks), name in plan:
        row = {"network": network, "tasks": tasks, "variant": name}
        rows.append(row)
        if time.monotonic() - began > float(os.environ["GPU_CHECK_SECONDS"]) - 12:
            row["left out"] = "no time left"
            continue
        try:
            p = problem(network, tasks, device)
            row["floor_bytes"] = p.setup.floor_bytes
            variant = kinds[name](p)
            if (network, tasks) in main or device == "cpu":
                check(variant, p)
            p.__dict__.pop("expected", None), p.__dict__.pop("flat_gradients", None)
            row |= measure(variant.step, device)
            del variant, p
        except Exception as error:  # one variant's failure is its row's, and the section's
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        if device == "cuda":
            torch.cuda.empty_cache()
        so_far({"rows": rows})
    broken = [f"{row['variant']} ({row['network']}, T = {row['tasks']})" for row in rows if "error" in row]
    return {"rows": rows, **({"error": f"failed: {', '.join(broken)}"} if broken else {})}


PROFILED = [("resnet20", 8), ("resnet18", 8), ("resnet20", 32), ("resnet20", 128)]
METRICS = {  # the profiler's name → ours
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "smsp__inst_executed.sum": "instructions of warps",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of most",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}


def profiled(device: str) -> dict:
    """One step of each of PROFILED for a profiler that watches between start and stop."""
    import torch

    for network, tasks in PROFILED:
        step = variants(device)["step(), cuda"](problem(network, tasks, device)).step
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return {}


def measure(step: Callable[[], object], device: str) -> dict:
    """Medians in microseconds: on the device with cold and with warm L2, of the host's call, and of a step in a row of steps."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    synchronize(device)
    whole = time.perf_counter() - start
    repeats = max(5, min(50, int(0.5 / max(whole, 1e-6))))
    hosts = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    row_of_steps = (time.perf_counter() - start) / repeats
    cold = timed(step, device, repeats, ahead=host, flush=True)
    warm = timed(step, device, repeats, ahead=host, flush=False)
    medians = {
        name: statistics.median(times)
        for name, times in (("device_cold", cold), ("device_warm", warm), ("host", hosts))
    }
    values = medians | {"in_a_row": row_of_steps}
    spread = [1e6 * x for x in statistics.quantiles(cold, n=10, method="inclusive")[::8]]
    return {
        "us": {name: round(1e6 * value, 2) for name, value in values.items()},
        "device_cold_10_90": spread,
        "repeats": repeats,
    }


def timed(run: Callable[[], object], device: str, repeats: int, ahead: float = 0.0, flush: bool = False) -> list[float]:
    """Seconds between two events around each run; the device sleeps first, so that the host has queued all of it by then.

    ahead: seconds that the host needs for one run. flush: read twice the L2 cache before each run; what a write left there would be written
    back at the run's expense.
    """
    import torch

    if device == "cpu":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds
    wiper = torch.zeros(torch.cuda.get_device_properties(0).L2_cache_size * 2 // 4, device=device) if flush else None
    pairs = []
    for _ in range(repeats):
        if wiper is not None:
            wiper.sum()
        else:
            run()
        torch.cuda._sleep(int(min(0.05, 1.5 * ahead + 50e-6) * 2e9))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        pairs.append((start, end))
        torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def training(device: str) -> dict:
    """Whole training steps a second of eight ResNet20s at batch 128 and 32 pixels: the released script's form, compiled networks with torch's
    foreach ops, `step()`, and the whole step in a CUDA graph with each thing that helps it, alone and together."""
    import torch

    tasks, batch, side, repeats = (8, 128, 32, 30) if device == "cuda" else (2, 4, 8, 2)
    x = [
        torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(tasks)
    ]
    y = [torch.randint(10, (batch,), device=device) for _ in range(tasks)]
    loops = {"released form, eager": lambda: by_hand(tasks, x, y, "released", False)}
    if device == "cuda":
        captured = {f"{streams} streams": dict(streams=streams) for streams in (1, 2, 4, 8)}
        captured |= {"8 streams, cudnn.benchmark": dict(benchmark=True), "8 streams, bf16": dict(bf16=True)}
        captured |= {"8 streams, cudnn.benchmark, bf16": dict(benchmark=True, bf16=True)}
        for name, how in captured.items():
            loops[f"captured, {name}"] = lambda how=how: ours(tasks, x, y, "cuda", True, **how)
        loops["captured, triton, 8 streams"] = lambda: ours(tasks, x, y, "triton", True)
        for backend in ("cuda", "triton"):
            loops[f"step(), {backend}, eager"] = lambda backend=backend: ours(tasks, x, y, backend)
        loops["compiled + foreach"] = lambda: by_hand(
            tasks, x, y, "foreach", True
        )  # the last: compiling takes half a minute
    else:
        loops["step(), torch, eager"] = lambda: ours(tasks, x, y, "torch")
    results, expected, began = {}, None, time.monotonic()
    for name, make in loops.items():
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
        results[name] = {
            "steps_per_second": 1 / statistics.median(seconds), "apart_from_first_after_5_steps": float((values - expected).abs().max()),
        }  # fmt: skip
        so_far({"loops": results})
        del step, replicas
    wrong = [
        name
        for name, r in results.items()
        if "left out" not in r and not r["apart_from_first_after_5_steps"] < (0.1 if "bf16" in name else 1e-2)
    ]
    return {"loops": results, **({"error": f"other parameters after 5 steps: {', '.join(wrong)}"} if wrong else {})}


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


def by_hand(tasks: int, x: list, y: list, form: str, compiled: bool) -> tuple:
    """(step, nets) of T torch.optim.SGDs and the meta-update beside them: "released", its script's loops, or "foreach" ops."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.common.variants import SGD, Foreach, ReleasedForm

    nets = replicas_on(x[0].device, tasks)
    torch.set_float32_matmul_precision("high")
    loss = (
        torch.compile(lambda net, x, y: cross_entropy(net(x), y))
        if compiled
        else lambda net, x, y: cross_entropy(net(x), y)
    )
    if form == "released":
        named = [dict(net.body.named_parameters()) for net in nets]
        update = ReleasedForm.of([torch.optim.SGD(net.parameters(), foreach=False, **SGD) for net in nets], named)
    else:
        update = Foreach.__new__(Foreach)
        update.tasks = [list(net.body.parameters()) for net in nets]
        update.initialization = [p.detach().clone() for p in update.tasks[0]]
        update.optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], foreach=True, **SGD)

    def step():
        for net, one, label in zip(nets, x, y, strict=True):
            net.zero_grad()
            loss(net, one, label).backward()
        update.step()

    return step, nets


def ours(
    tasks: int,
    x: list,
    y: list,
    backend: str,
    captured: bool = False,
    streams: int = 8,
    benchmark: bool = False,
    bf16: bool = False,
) -> tuple:
    """(step, nets) with ShiftingMetaOptimizer, as a CUDA graph if captured."""
    from benchmarks.common.variants import BETA, SGD
    from cts_fast import ShiftingMetaOptimizer
    from cts_fast.capture import CapturedStep
    from cts_fast.experiments.meta_train import loss as loss_in

    nets = replicas_on(x[0].device, tasks)
    loss = partial(loss_in, precision="bf16" if bf16 else "fp32")
    opt = ShiftingMetaOptimizer(
        [net.body.named_parameters() for net in nets], heads=[net.head.parameters() for net in nets], meta_lr=BETA, horizon=None,
        backend=backend, capturable=captured, **SGD,
    )  # fmt: skip
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


# Parts ---------------------------------------------------------------------------------------------------------------------------


def variants(device: str) -> dict[str, type]:
    """The ways to take a step that are compared, ours first."""
    from benchmarks.common.variants import (
        CompiledFlatGathered,
        CompiledUnrolledGathered,
        Flat,
        Foreach,
        FusedForeach,
        NaiveLoop,
        Ours,
    )

    class FlatGathered(CompiledFlatGathered):
        """Flat tensors, the gradients copied to their places in them first."""

        def __init__(self, problem) -> None:
            super().__init__(problem)
            self.update = Flat.update  # nothing is compiled before its first call

    def ours(name: str) -> type:
        return type(f"Ours{name.title()}", (Ours,), {"backend": name, "__doc__": f"`step()` on the {name} backend."})

    class Captured(Ours):
        """`step()` in a CUDA graph, the step alone."""

        backend = "cuda"

        def __init__(self, problem) -> None:
            import torch

            super().__init__(problem, capturable=True)
            self.graph, self.steps = torch.cuda.CUDAGraph(), 0

        def step(self) -> None:
            import torch

            self.steps += 1
            if self.steps == 2:  # the first one is eager; a capture does nothing yet
                with torch.cuda.graph(self.graph):
                    super().step()
            self.graph.replay() if self.steps > 1 else super().step()

    own = {f"step(), {name}": ours(name) for name in (("cuda", "triton", "torch") if device == "cuda" else ("torch",))}
    if device == "cuda":
        own = {"step(), cuda": own.pop("step(), cuda"), "step(), cuda, captured": Captured} | own
    return own | {
        "naive loop": NaiveLoop,
        "foreach": Foreach,
        "fused + foreach": FusedForeach,
        "flat + copy": FlatGathered,
        **({"compiled unrolled + copy": CompiledUnrolledGathered} if device == "cuda" else {}),
    }


def problem(network: str, tasks: int, device: str):
    """A set-up's parameters and gradients on the device."""
    from torch import nn

    from benchmarks.common import setups

    def resnet50():
        from torchvision.models import resnet50

        net = resnet50()
        net.fc = nn.Identity()
        return net

    def gpt124m():
        width, layers = 768, 12
        blocks = [
            [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 4 * width),
             nn.Linear(4 * width, width)] for _ in range(layers)
        ]  # fmt: skip
        return nn.ModuleList(
            [
                nn.Embedding(50257, width),
                nn.Embedding(1024, width),
                *(m for block in blocks for m in block),
                nn.LayerNorm(width),
            ]
        )

    setups.NETWORKS.update(resnet50=resnet50, gpt124m=gpt124m)
    made = setups.Problem.__new__(setups.Problem)
    made.setup = setups.Setup(network, tasks)
    import torch

    draw = torch.Generator(device).manual_seed(0)
    layout = setups.parameter_layout(network)
    made.names = [name for name, _, _ in layout]

    def tensors():
        return [
            torch.empty_strided(shape, stride, device=device).normal_(0, 0.1, generator=draw)
            for _, shape, stride in layout
        ]

    made.start = tensors()
    made.gradients = [tensors() for _ in range(tasks)]
    return made


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
