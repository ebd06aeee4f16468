"""Everything that only a GPU can show, section by section: python benchmarks/gpu_check.py [--device cpu for a dry run of what needs none].

Sections run in processes of their own, so that one that crashes or hangs costs itself alone; what is known is written after each of them to
benchmarks/results/<device>-<date>.json. Exit code 1 if a section failed. benchmarks/gpu_check.sh builds the package first.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind the installed package, which the checkout's own folder must not hide

SECTIONS = {"tests": 200, "sanitizers": 90, "counts": 60, "bandwidth": 40, "steps": 170, "training": 90}  # seconds that each may take


def main() -> int:
    """Run all sections, or with --section one of them here, which prints its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run on small problems")
    parser.add_argument("--section", choices=(*SECTIONS, "small"), help="run one section in this process")
    parser.add_argument("--only", nargs="*", choices=tuple(SECTIONS), default=tuple(SECTIONS), help="the sections to run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build-log", type=Path, help="what the build said; kept with the results")
    arguments = parser.parse_args()
    if arguments.section:
        result = SECTION_FUNCTIONS[arguments.section](arguments.device)
        print("\nRESULT " + json.dumps(result))
        return 0
    return run_all(arguments)


def run_all(arguments) -> int:
    """The machine, then each section; writes after each one."""
    results = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "device": arguments.device, "sections": {}}
    results["machine"] = subprocess_json("machine", "cuda" if arguments.device == "cuda" else "cpu", 60)
    if arguments.build_log:
        results["build"] = {"log_tail": arguments.build_log.read_text(errors="replace")[-3000:]}
    name = re.sub(r"[^a-z0-9]+", "-", str(results["machine"].get("name", arguments.device)).lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}-{results['date'][:10]}.json"
    failed = ["machine"] if "error" in results["machine"] else []
    for section in arguments.only:
        print(f"== {section}", flush=True)
        began = time.monotonic()
        result = subprocess_json(section, arguments.device, SECTIONS[section])
        result["seconds"] = round(time.monotonic() - began, 1)
        results["sections"][section] = result
        if "error" in result:
            failed.append(section)
            print(f"FAILED: {result['error']}", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    path.with_suffix(".txt").write_text(text)
    print(text)
    print(f"written: {path}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def subprocess_json(section: str, device: str, seconds: float) -> dict:
    """A section's result from a process of its own; {"error": …} if it failed, crashed or took too long."""
    command = [sys.executable, str(Path(__file__).resolve()), "--section", section, "--device", device]
    if section == "machine":
        command = [sys.executable, "-c", MACHINE, device]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT / "benchmarks")
    except subprocess.TimeoutExpired as error:
        return {"error": f"took more than {seconds} s", "output": str(error.stdout or b"")[-2000:] + str(error.stderr or b"")[-2000:]}
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        return {"error": f"exit code {process.returncode}", "output": process.stdout[-2000:] + process.stderr[-4000:]}
    return json.loads(lines[-1][len("RESULT "):])


MACHINE = """
import json, platform, subprocess, sys, torch
facts = {"name": sys.argv[1], "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    facts["triton"] = None
from cts_fast import ops
facts["off"] = {n: w for n in ops.BACKENDS if (w := ops.unavailable(n, torch.device(sys.argv[1]), torch.float32))}
if sys.argv[1] == "cuda":
    p = torch.cuda.get_device_properties(0)
    facts.update(name=p.name, capability=[p.major, p.minor], multiprocessors=p.multi_processor_count, l2_bytes=p.L2_cache_size)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader"]
    facts["driver, clocks, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
print("RESULT " + json.dumps(facts))
"""


# Tests and sanitizers ------------------------------------------------------------------------------------------------------------


def tests(device: str) -> dict:
    """The step's tests on every backend, in a few processes side by side; a failure of one is a failure of the section."""
    on = device
    jobs = {
        "cuda": (["test_shifting_step.py", "test_counted_steps.py"], f"cuda-{on}", "60"),
        # Triton compiles a kernel for every number of tasks, dtype and set of options: several processes
        "triton, float32": (["test_shifting_step.py"], f"triton-{on} and any_number and float32", "1"),
        "triton, float64": (["test_shifting_step.py"], f"triton-{on} and any_number and float64", "1"),
        "triton, bfloat16": (["test_shifting_step.py"], f"triton-{on} and any_number and bfloat16", "1"),
        "triton, float16": (["test_shifting_step.py"], f"triton-{on} and any_number and float16 and not bfloat16", "1"),
        "triton, the rest": (["test_shifting_step.py"], f"triton-{on} and not any_number", "3"),
        "triton, counted": (["test_counted_steps.py"], f"triton-{on}", "3"),
        "torch": (["test_shifting_step.py"], f"torch-{on}", "20"),
        "gpu": (["test_gpu.py"], "", "1"),
        "source": (["test_cuda_source.py"], "not sanitizers", "1"),
    }
    if device == "cpu":
        jobs = {"torch": (["test_shifting_step.py"], "torch-cpu and by_hand", "2"), "gpu": jobs["gpu"]}
    running, results = {}, {}
    for name, (files, which, examples) in jobs.items():
        report = Path(os.environ.get("TMPDIR", "/tmp")) / f"gpu-check-{os.getpid()}-{len(running)}.xml"
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # not -m pytest, which would put the checkout before the package
        command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", *files]
        command += ["-k", which] if which else []
        environment = {**os.environ, "CTS_FAST_EXAMPLES": examples, "OMP_NUM_THREADS": "4"}
        process = subprocess.Popen(command, cwd=ROOT / "tests", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running[name] = (process, report)
    deadline = time.monotonic() + SECTIONS["tests"] - 10
    for name, (process, report) in running.items():
        try:
            output, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            results[name] = {"error": "took too long", "tail": output[-1500:]}
            continue
        results[name] = counts_of(report) | ({"tail": output[-3000:]} if process.returncode else {})
        if process.returncode not in (0, 5 if device == "cpu" else 0) or not results[name].get("tests"):
            results[name]["error"] = f"pytest exit code {process.returncode}"
        elif device == "cuda" and results[name]["skipped"] == results[name]["tests"]:
            results[name]["error"] = "every test was skipped"
    broken = [name for name, result in results.items() if "error" in result]
    return {"processes": results, **({"error": f"tests failed: {', '.join(broken)}"} if broken else {})}


def counts_of(report: Path) -> dict:
    """Numbers of tests, failures, errors and skips of a JUnit file, and the reasons for skips."""
    if not report.exists():
        return {}
    tree = xml.etree.ElementTree.parse(report)
    report.unlink()
    suites = list(tree.iter("testsuite"))
    numbers = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    return numbers | {"skips": sorted({skip.get("message", "")[:120] for skip in tree.iter("skipped")})}


def sanitizers(device: str) -> dict:
    """compute-sanitizer's tools on a small case; where the machine refuses it, that is the result."""
    tool = shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if tool is None or device == "cpu":
        return {"refused": "compute-sanitizer was not found" if tool is None else "a dry run"}
    results = {}
    for name in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, str(Path(__file__).resolve()), "--section", "small"]
        try:
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, whose end a tool can see
            process = subprocess.run(command, capture_output=True, text=True, timeout=28, env=environment)
        except subprocess.TimeoutExpired:
            results[name] = {"refused": "took more than 28 s"}
            continue
        tail = (process.stdout + process.stderr)[-1500:]
        if process.returncode == 0 and "ERROR SUMMARY: 0 errors" in tail + process.stdout:
            results[name] = {"errors": 0}
        elif re.search(r"not supported|Unable to|refused|Internal Sanitizer Error", tail):
            results[name] = {"refused": tail}
        else:
            results[name] = {"exit code": process.returncode, "tail": tail}
    broken = [name for name, result in results.items() if "exit code" in result]
    return {"tools": results, **({"error": f"sanitizer reports: {', '.join(broken)}"} if broken else {})}


def small(device: str) -> dict:
    """A few steps of the cuda backend with everything in them; what the sanitizers watch."""
    import torch

    from cts_fast import ShiftingMetaOptimizer

    for tasks, dtype, capturable in [(3, torch.float32, False), (8, torch.bfloat16, True), (17, torch.float32, True)]:
        shapes = [(5, 3), (129,), (1030,)]
        params = [[torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes] for _ in range(tasks)]
        heads = [[torch.nn.Parameter(torch.randn(t + 1, device=device).to(dtype))] for t in range(tasks)]
        for task in params[1:]:
            for p, q in zip(task, params[0], strict=True):
                p.data.copy_(q)
        opt = ShiftingMetaOptimizer(
            params, lr=0.1, momentum=0.9, dampening=0.5, meta_lr=0.1, horizon=2, heads=heads, capturable=capturable, backend="cuda"
        )
        for step in range(3):
            for t, task in enumerate([*params, *heads]):
                for p in task:
                    p.grad = None if t == step else torch.randn(p.numel() + 1, device=device).to(dtype)[1:].view_as(p)
            opt.step()
    torch.cuda.synchronize()
    return {}


# Launches ------------------------------------------------------------------------------------------------------------------------


def counts(device: str) -> dict:
    """Kernels, copies, memsets and waits of one step with unchanged gradients, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps, results = 10, {}
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
            inside = time.perf_counter()
            synchronize(device)
        events = profiler.events()
        on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        host = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU]
        waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
        results[name] = {
            "kernels": sum(not re.search("Memcpy|Memset", n) for n in on_device) / steps,
            "copies": sum("Memcpy" in n for n in on_device) / steps,
            "memsets": sum("Memset" in n for n in on_device) / steps,
            "waits": sum(n in waits for n in host) / steps - (1 / steps if device == "cuda" else 0),  # one is the profile's own
            "host ops": sum(n.startswith("aten::") for n in host) / steps,
        }
        del variant, inside
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
    networks = [("resnet20", 8), ("resnet18", 8), ("resnet20", 1), ("resnet20", 2), ("resnet20", 32), ("resnet50", 8), ("resnet20", 128), ("gpt124m", 8)]
    if device == "cpu":
        networks = [("resnet20", 2)]
    for network, tasks in networks:
        for name, make in variants(device).items():
            row = {"network": network, "tasks": tasks, "variant": name}
            rows.append(row)
            if time.monotonic() - began > SECTIONS["steps"] - 25:
                row["left out"] = "no time left"
                continue
            if name == "compiled unrolled + copy" and (tasks > 8 or network in ("resnet50", "gpt124m")):
                row["left out"] = "compiling it takes too long here"
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
    values = {"device_cold": statistics.median(cold), "device_warm": statistics.median(warm), "host": statistics.median(hosts), "in_a_row": row_of_steps}
    spread = [1e6 * x for x in statistics.quantiles(cold, n=10, method="inclusive")[:: 8]]
    return {"us": {name: round(1e6 * value, 2) for name, value in values.items()}, "device_cold_10_90": spread, "repeats": repeats}


def timed(run: Callable[[], object], device: str, repeats: int, ahead: float = 0.0, flush: bool = False) -> list[float]:
    """Seconds between two events around each run; the device sleeps first, so that the host has queued all of it by then.

    ahead: seconds that the host needs for one run. flush: walk through twice the L2 cache before each run.
    """
    import torch

    if device == "cpu":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds
    wiper = torch.empty(torch.cuda.get_device_properties(0).L2_cache_size * 2, dtype=torch.uint8, device=device) if flush else None
    pairs = []
    for _ in range(repeats):
        if wiper is not None:
            wiper.zero_()
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
    from benchmarks.variants import shift_by_name
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
        optimizers = [torch.optim.SGD(net.parameters(), foreach=False, **sgd) for net in replicas]
        named = [dict(net.body.named_parameters()) for net in replicas]
        base = {name: p.detach().clone() for name, p in named[0].items()}

        def step():
            for net in replicas:
                net.zero_grad()
            backward(replicas)
            for optimizer in optimizers:
                optimizer.step()
            shift_by_name(base, named)

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
        apart = float((values - expected).abs().max())
        results[name] = {"steps_per_second": steps_timed / (time.perf_counter() - start), "apart_from_first_after_5_steps": apart}
        del step, replicas
    wrong = [name for name, result in results.items() if not result["apart_from_first_after_5_steps"] < 1e-2]
    return {"loops": results, **({"error": f"other parameters after 5 steps: {', '.join(wrong)}"} if wrong else {})}


# Parts ---------------------------------------------------------------------------------------------------------------------------


def variants(device: str) -> dict[str, type]:
    """The ways to take a step that are compared, ours first."""
    from benchmarks.variants import CompiledUnrolledGathered, Foreach, FusedForeach, NaiveLoop, Ours

    def ours(name: str) -> type:
        return type(f"Ours{name.title()}", (Ours,), {"backend": name, "__doc__": f"`step()` on the {name} backend."})

    own = {f"step(), {name}": ours(name) for name in (("cuda", "triton", "torch") if device == "cuda" else ("torch",))}
    return own | {
        "naive loop": NaiveLoop,
        "foreach": Foreach,
        "fused + foreach": FusedForeach,
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


def table(results: dict) -> str:
    """The results as text."""
    sections, lines = results["sections"], [f"{results['machine'].get('name')}, {results['date']}", ""]
    for name, result in sections.get("tests", {}).get("processes", {}).items():
        lines.append(f"tests, {name}: " + ", ".join(f"{key} {result[key]}" for key in ("tests", "failures", "errors", "skipped", "error") if key in result))
    for name, result in sections.get("sanitizers", {}).get("tools", {"compute-sanitizer": sections.get("sanitizers", {})}).items():
        lines.append(f"sanitizer, {name}: " + json.dumps({key: str(value)[:100] for key, value in result.items() if key != "seconds"}))
    for name, result in sections.get("counts", {}).get("steps", {}).items():
        lines.append(f"a step, {name}: " + ", ".join(f"{key} {value:g}" for key, value in result.items()))
    rate = sections.get("bandwidth", {}).get("bytes_per_second")
    if rate:
        lines += [f"copy bandwidth: {rate / 1e12:.3f} TB/s", ""]
    rows = [row for row in sections.get("steps", {}).get("rows", []) if "us" in row]
    lines.append(f"{'network':10} {'T':>4} {'variant':26} {'cold µs':>10} {'warm µs':>10} {'host µs':>10} {'row µs':>10} {'of copy':>8}")
    for row in rows:
        share = f"{row['floor_bytes'] / (1e-6 * row['us']['device_cold']) / rate:8.1%}" if rate else ""
        us = " ".join(f"{row['us'][key]:10.1f}" for key in ("device_cold", "device_warm", "host", "in_a_row"))
        lines.append(f"{row['network']:10} {row['tasks']:4} {row['variant']:26} {us} {share}")
    for row in sections.get("steps", {}).get("rows", []):
        if "us" not in row:
            lines.append(f"{row['network']:10} {row['tasks']:4} {row['variant']:26} {row.get('error') or row.get('left out')}")
    lines.append("")
    for name, result in sections.get("training", {}).get("loops", {}).items():
        lines.append(f"training, {name}: {result['steps_per_second']:.2f} steps/s")
    lines += [f"FAILED {name}: {result['error']}" for name, result in sections.items() if "error" in result]
    return "\n".join(lines) + "\n"


SECTION_FUNCTIONS = {
    "tests": tests, "sanitizers": sanitizers, "counts": counts, "bandwidth": bandwidth, "steps": steps, "training": training, "small": small,
}  # fmt: skip

if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
