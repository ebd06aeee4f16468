"""What check.py measures of a step: its launches, its time, and the device's copy bandwidth."""

from __future__ import annotations

import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Container, Iterable

from benchmarks.gpu.results import hand_over
from benchmarks.gpu.variants import problem, synchronize, variants

# Launches -------------------------------------------------------------------------------------------------------------


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
        # what a label of the host spans on the device is no launch
        events = [e for e in profiler.events() if not e.is_user_annotation]
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
        hand_over({"steps": results})
    return {"steps": results}


# Time -----------------------------------------------------------------------------------------------------------------


def bandwidth(device: str) -> dict:
    """Bytes read and written per second by a large copy within the device's memory."""
    import torch

    numbers = (1 << 30) if device == "cuda" else 1 << 22  # 4 GiB of float32
    a, b = (torch.randn(numbers, device=device) for _ in range(2))
    seconds, moved = statistics.median(timed(lambda: b.copy_(a), device, 15)), 2 * 4 * numbers
    return {"bytes_per_second": moved / seconds, "seconds": seconds, "bytes": moved}


MAIN = [("resnet20", 8), ("resnet18", 8)]  # (network, T): every variant is measured there, and checked before
MORE = [("resnet20", tasks) for tasks in (16, 32, 128, 1, 2, 4)] + [("resnet50", 8), ("gpt124m", 8)]


def plan(names: list[str], device: str) -> list[tuple[tuple[str, int], str]]:
    """((network, T), variant) in the order in which they are measured, ours on all networks first."""
    if device == "cpu":
        return [(("resnet20", 2), name) for name in names]
    ours = [name for name in names if name.startswith("step()") and "torch" not in name]
    theirs = [name for name in names if name not in ours]
    last = [("resnet20", 32), ("resnet50", 8), ("gpt124m", 8)]
    parts = ((MAIN, ours), (MORE, ours), (MAIN, theirs), (last, ["foreach", "fused + foreach"]))
    return [(problem, name) for problems, some in parts for problem in problems for name in some]


def steps(device: str) -> dict:
    """One step's device and host time, in the order of `plan`."""
    rows = []
    if device == "cuda":
        import torch

        empty = measure(lambda: torch.cuda._sleep(0), device)
        rows.append({"network": "none", "tasks": 0, "variant": "an empty kernel", **empty})
    checked = MAIN if device == "cuda" else [("resnet20", 2)]
    return timed_steps([(*one, one[1]) for one in plan(list(variants(device)), device)], device, checked, rows)


def timed_steps(
    which: Iterable[tuple[tuple[str, int], str, str]],
    device: str,
    checked: Container[tuple[str, int]],
    rows: Iterable[dict] = (),
) -> dict:
    """`rows`, and one for each ((network, T), variant, its name in the row); those in `checked` are checked first."""
    from benchmarks.common.variants import check

    began, rows, kinds = time.monotonic(), list(rows), variants(device)
    for (network, tasks), name, shown in which:
        row = {"network": network, "tasks": tasks, "variant": shown}
        rows.append(row)
        if time.monotonic() - began > float(os.environ["GPU_CHECK_SECONDS"]) - 12:
            row["left out"] = "no time left"
            continue
        try:
            p = problem(network, tasks, device)
            row["floor_bytes"] = p.setup.floor_bytes
            variant = kinds[name](p)
            if (network, tasks) in checked:
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
        hand_over({"rows": rows})
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
    """Medians in microseconds.

    On the device with cold and with warm L2, of the host's call, and of a step in a row of steps.
    """
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
    medians = {name: statistics.median(times) for name, times in (("device_cold", cold), ("device_warm", warm))}
    values = medians | {"host": statistics.median(hosts), "in_a_row": row_of_steps}
    us = {name: round(1e6 * value, 2) for name, value in values.items()}
    spread = [1e6 * x for x in statistics.quantiles(cold, n=10, method="inclusive")[::8]]
    return {"us": us, "device_cold_10_90": spread, "repeats": repeats}


def timed(run: Callable[[], object], device: str, repeats: int, ahead: float = 0.0, flush: bool = False) -> list[float]:
    """Seconds between two events around each run; the device sleeps first, so that the host has queued all by then.

    ahead: seconds that the host needs for one run. flush: read twice the L2 cache before each run; what a write left
    there would be written back at the run's expense.
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
