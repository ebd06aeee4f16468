"""What gpu_check.py measures: launches of a step, its time, the device's copy bandwidth, and whole training steps."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable


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
        if name in ("compiled unrolled + copy",):
            continue
        variant = make(problem("resnet20", 8 if device == "cuda" else 2, device))
        for _ in range(3):
            variant.step()
        synchronize(device)
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                variant.step()
            synchronize(device)
        events = [e for e in profiler.events() if not e.is_user_annotation]  # what a label of the host spans on the device is no launch
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
    return {"bytes_per_second": 2 * 4 * numbers / statistics.median(seconds), "seconds": statistics.median(seconds), "bytes": 8 * numbers}


def steps(device: str) -> dict:
    """One step's device and host time: four networks at 8 tasks, then ResNet20 at other numbers of tasks; every variant is checked first."""
    from benchmarks.variants import check

    began, rows = time.monotonic(), []
    networks = [("resnet20", 8), ("resnet18", 8), ("resnet20", 1), ("resnet20", 2), ("resnet20", 32), ("resnet50", 8)]
    networks += [("resnet20", 128), ("gpt124m", 8)]
    if device == "cpu":
        networks = [("resnet20", 2)]
    for network, tasks in networks:
        for name, make in variants(device).items():
            row = {"network": network, "tasks": tasks, "variant": name}
            rows.append(row)
            if time.monotonic() - began > float(os.environ["GPU_CHECK_SECONDS"]) - 20:
                row["left out"] = "no time left"
                continue
            if name == "compiled unrolled + copy" and (tasks != 8 or network not in ("resnet20", "resnet18")):
                row["left out"] = "compiling it takes too long for this check"
                continue
            if network == "gpt124m" and name not in ("step(), cuda", "step(), triton", "foreach", "fused + foreach"):
                row["left out"] = "too slow for this check"
                continue
            try:
                p = problem(network, tasks, device)
                row["floor_bytes"] = p.setup.floor_bytes
                variant = make(p)
                if network in ("resnet20", "resnet18"):
                    check(variant, p)
                p.__dict__.pop("expected", None), p.__dict__.pop("flat_gradients", None)
                row |= measure(variant.step, device)
                del variant, p
            except Exception as error:  # one variant's failure is its row's, and the section's
                row["error"] = f"{type(error).__name__}: {error}"[:500]
                traceback.print_exc()
            if device == "cuda":
                import torch

                torch.cuda.empty_cache()
            so_far({"rows": rows})
    broken = [f"{row['variant']} ({row['network']}, T = {row['tasks']})" for row in rows if "error" in row]
    return {"rows": rows, **({"error": f"failed: {', '.join(broken)}"} if broken else {})}


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
    medians = {name: statistics.median(times) for name, times in (("device_cold", cold), ("device_warm", warm), ("host", hosts))}
    values = medians | {"in_a_row": row_of_steps}
    spread = [1e6 * x for x in statistics.quantiles(cold, n=10, method="inclusive")[:: 8]]
    return {"us": {name: round(1e6 * value, 2) for name, value in values.items()}, "device_cold_10_90": spread, "repeats": repeats}


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
    """Training steps per second of eight ResNet20s, batch 128: the released script's form, step(), and the whole step in a CUDA graph."""
    import torch
    from torch import nn

    from benchmarks.setups import HYPER
    from benchmarks.variants import ReleasedForm
    from cts_fast import ShiftingMetaOptimizer
    from cts_fast.models import ResNet20

    tasks, batch, side, steps_timed = (8, 128, 32, 40) if device == "cuda" else (2, 4, 8, 2)
    sgd = dict(lr=HYPER.lr, momentum=HYPER.momentum, weight_decay=HYPER.weight_decay)
    data = [
        (torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,), device=device))
        for _ in range(tasks)
    ]

    def nets():
        torch.manual_seed(0)
        first = ResNet20(10)
        made = [ResNet20(10).to(device) for _ in range(tasks)]
        for net in made:
            net.load_state_dict(first.state_dict())
        return made

    def loss(net, x, y):
        return nn.functional.cross_entropy(net(x), y)

    def backward(replicas):
        for net, (x, y) in zip(replicas, data, strict=True):
            loss(net, x, y).backward()

    def released():
        replicas = nets()
        update = ReleasedForm.of([torch.optim.SGD(net.parameters(), foreach=False, **sgd) for net in replicas],
                                 [dict(net.body.named_parameters()) for net in replicas])  # fmt: skip

        def step():
            for net in replicas:
                net.zero_grad()
            backward(replicas)
            update.step()

        return step, replicas

    def ours(backend, captured):
        replicas = nets()
        opt = ShiftingMetaOptimizer(
            [net.body.named_parameters() for net in replicas], heads=[net.head.parameters() for net in replicas], meta_lr=HYPER.meta_lr,
            horizon=None, backend=backend, capturable=captured, **sgd,
        )  # fmt: skip

        def step():
            opt.zero_grad()
            backward(replicas)
            opt.step()

        if captured:
            from cts_fast.capture import CapturedStep

            whole = CapturedStep(replicas, opt, loss)
            return lambda: whole(data), replicas
        return step, replicas

    made = {"released form, eager": released}
    for name in ("cuda", "triton") if device == "cuda" else ("torch",):
        made[f"step(), {name}, eager"] = lambda name=name: ours(name, False)
        if device == "cuda":
            made[f"step(), {name}, whole step captured"] = lambda name=name: ours(name, True)
    results, expected = {}, None
    for name, make in made.items():
        step, replicas = make()
        for _ in range(5):
            step()
        synchronize(device)
        values = torch.cat([p.detach().flatten().float() for net in replicas for p in net.parameters()])
        expected = values if expected is None else expected
        start = time.perf_counter()
        for _ in range(steps_timed):
            step()
        synchronize(device)
        seconds = time.perf_counter() - start
        apart = float((values - expected).abs().max())
        results[name] = {"steps_per_second": steps_timed / seconds, "apart_from_first_after_5_steps": apart}
        so_far({"loops": results})
        del step, replicas
    wrong = [name for name, result in results.items() if not result["apart_from_first_after_5_steps"] < 1e-2]
    return {"loops": results, **({"error": f"other parameters after 5 steps: {', '.join(wrong)}"} if wrong else {})}


# Parts ---------------------------------------------------------------------------------------------------------------------------


def variants(device: str) -> dict[str, type]:
    """The ways to take a step that are compared, ours first."""
    from benchmarks.variants import CompiledFlatGathered, CompiledUnrolledGathered, Flat, Foreach, FusedForeach, NaiveLoop, Ours

    class FlatGathered(CompiledFlatGathered):
        """Flat tensors, the gradients copied to their places in them first."""

        def __init__(self, problem) -> None:
            super().__init__(problem)
            self.update = Flat.update  # nothing is compiled before its first call

    def ours(name: str) -> type:
        return type(f"Ours{name.title()}", (Ours,), {"backend": name, "__doc__": f"`step()` on the {name} backend."})

    own = {f"step(), {name}": ours(name) for name in (("cuda", "triton", "torch") if device == "cuda" else ("torch",))}
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

    from benchmarks import setups

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
        return nn.ModuleList([nn.Embedding(50257, width), nn.Embedding(1024, width), *(m for block in blocks for m in block), nn.LayerNorm(width)])

    setups.NETWORKS.update(resnet50=resnet50, gpt124m=gpt124m)
    made = setups.Problem.__new__(setups.Problem)
    made.setup = setups.Setup(network, tasks)
    import torch

    draw = torch.Generator(device).manual_seed(0)
    layout = setups.parameter_layout(network)
    made.names = [name for name, _, _ in layout]

    def tensors():
        return [torch.empty_strided(shape, stride, device=device).normal_(0, 0.1, generator=draw) for _, shape, stride in layout]

    made.start = tensors()
    made.gradients = [tensors() for _ in range(tasks)]
    return made


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
