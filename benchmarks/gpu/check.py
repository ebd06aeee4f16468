"""Everything that only a GPU can show, section by section: python benchmarks/gpu/check.py [--device cpu for a dry run of what needs none].

Sections run in processes of their own, so that one that crashes or hangs costs no other one, and of its own results only those to come; what
is known is written after each of them to benchmarks/results/<device>-<date>.json. Exit code 1 if a section failed. benchmarks/gpu_check.sh builds
the package first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path = [
    *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"),
    str(ROOT),
]  # the installed package comes first

from benchmarks.gpu.measure import so_far  # noqa: E402

SECTIONS = {
    "bandwidth": 10,
    "steps": 70,
    "training": 70,
    "tests": 90,
    "counts": 25,
    "profiler": 35,
    "sanitizers": 40,
}  # their shares of the time
LIMIT = "GPU_CHECK_SECONDS"  # what is left for a section, in its process's environment
LOGS = "GPU_CHECK_LOGS"  # where the tests' whole output goes


def main() -> int:
    """Run all sections, or with --section one of them here, which prints its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run on small problems")
    parser.add_argument("--section", choices=(*SECTIONS, "small", "profiled"), help="run one section in this process")
    parser.add_argument(
        "--only", nargs="*", choices=tuple(SECTIONS), default=tuple(SECTIONS), help="the sections to run"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--seconds", type=float, default=300, help="for all sections together; later ones share what earlier ones left"
    )
    parser.add_argument("--build-log", type=Path, help="what the build said; kept with the results")
    arguments = parser.parse_args()
    if arguments.section:
        from benchmarks.gpu import measure as gpu_measure

        own = {"tests": tests, "sanitizers": sanitizers, "small": small, "profiler": profiler}
        result = (own.get(arguments.section) or getattr(gpu_measure, arguments.section))(arguments.device)
        so_far(result)
        return 0
    return run_all(arguments)


def run_all(arguments) -> int:
    """The machine, then each section; writes after each one."""
    deadline = time.monotonic() + arguments.seconds
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": arguments.device,
        "revision": revision(),
        "sections": {},
    }
    results["machine"] = subprocess_json("machine", "cuda" if arguments.device == "cuda" else "cpu", 60)
    if arguments.build_log:
        results["build"] = arguments.build_log.read_text(errors="replace").rstrip().rpartition("\n")[2]
    name = re.sub(r"[^a-z0-9]+", "-", str(results["machine"].get("name", arguments.device)).lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}-{results['date'][:10]}.json"
    os.environ[LOGS] = str(path.with_name(path.stem + "-tests.log").resolve())
    failed = ["machine"] if "error" in results["machine"] else []
    for i, section in enumerate(arguments.only):
        print(f"== {section}", flush=True)
        began = time.monotonic()
        left = deadline - began
        share = SECTIONS[section] / sum(SECTIONS[one] for one in arguments.only[i:])
        result = subprocess_json(section, arguments.device, max(share * left, min(15, left)))
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


def revision() -> str | None:
    """The revision that is checked: the environment's REVISION, else git's."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("REVISION") or (described.stdout.strip() if described.returncode == 0 else None)


def last_result(output: str) -> dict | None:
    """What a section handed over last."""
    found = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    for text in reversed(found):
        try:
            return json.loads(text)
        except ValueError:  # cut off in the middle
            continue
    return None


def subprocess_json(section: str, device: str, seconds: float) -> dict:
    """A section's result from a process of its own; with an "error" if it failed, crashed or took too long."""
    command = [sys.executable, str(Path(__file__).resolve()), "--section", section, "--device", device]
    if section == "machine":
        command = [sys.executable, "-c", MACHINE, device]
    if seconds < 5:
        return {"error": "no time was left for it"}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        process = started(command, stdout, stderr, cwd=ROOT.anchor, env={**os.environ, LIMIT: str(seconds)})
        in_time = ended(process, seconds)
        output, errors = (file.seek(0) or file.read() for file in (stdout, stderr))
    result = last_result(output)
    if not in_time:
        return {**(result or {}), "error": f"took more than {seconds:.0f} s", "output": output[-2000:] + errors[-2000:]}
    if process.returncode or result is None:
        return {**(result or {}), "error": f"exit code {process.returncode}", "output": output[-2000:] + errors[-4000:]}
    return result


def started(command: list[str], stdout, stderr=subprocess.STDOUT, **more) -> subprocess.Popen:
    """A process that leads a group of its own, so that `ended` can end what it starts too."""
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, start_new_session=True, **more)


def ended(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process, and after so many seconds end its whole group; whether it ended by itself."""
    try:
        process.wait(timeout=max(0.1, seconds))
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone with its last process
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


MACHINE = """
import json, os, platform, shutil, subprocess, sys, torch
facts = {"name": sys.argv[1], "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    facts["triton"] = None
from cts_fast.engine.step import BACKENDS, unavailable
facts["off"] = {n: w for n in BACKENDS if (w := unavailable(n, torch.device(sys.argv[1]), torch.float32))}
if sys.argv[1] == "cuda":
    p = torch.cuda.get_device_properties(0)
    facts.update(name=p.name, capability=[p.major, p.minor], multiprocessors=p.multi_processor_count, l2_bytes=p.L2_cache_size)
    facts.update(tf32_convolutions=torch.backends.cudnn.allow_tf32, tf32_matmul=torch.backends.cuda.matmul.allow_tf32)
    facts.update(cudnn=torch.backends.cudnn.version(), cudnn_benchmark=torch.backends.cudnn.benchmark)
    facts.update(connections=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader"]
    facts["driver, clocks, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
print("RESULT " + json.dumps(facts))
"""


# Tests and sanitizers ------------------------------------------------------------------------------------------------------------


def tests(device: str) -> dict:
    """The step's tests on every backend, in a few processes side by side; a failure of one is a failure of the section."""
    on = device
    jobs = {
        "cuda": (
            ["engine/test_shifting_step.py", "engine/test_counted_steps.py", "engine/test_cuda_backend.py"],
            f"cuda-{on}",
            "15",
        ),
        # Triton compiles a kernel for every number of tasks, dtype and set of options: several processes
        "triton, float32": (["engine/test_shifting_step.py"], f"triton-{on} and any_number and float32", "1"),
        "triton, float64": (["engine/test_shifting_step.py"], f"triton-{on} and any_number and float64", "1"),
        "triton, bfloat16": (["engine/test_shifting_step.py"], f"triton-{on} and any_number and bfloat16", "1"),
        "triton, float16": (
            ["engine/test_shifting_step.py"],
            f"triton-{on} and any_number and float16 and not bfloat16",
            "1",
        ),
        "triton, the rest": (["engine/test_shifting_step.py"], f"triton-{on} and not any_number", "3"),
        "triton, counted": (["engine/test_counted_steps.py"], f"triton-{on}", "3"),
        "triton, table": (["engine/test_triton_backend.py"], "table or alignment", "1"),
        "torch": (["engine/test_shifting_step.py"], f"torch-{on}", "8"),
        "gpu": (["gpu/test_gpu.py"], "not triton", "1"),
        "gpu, triton": (["gpu/test_gpu.py"], "triton", "1"),
        "source": (["engine/test_cuda_source.py"], "not sanitizers", "1"),
    }
    if device == "cpu":
        jobs = {"torch": (["engine/test_shifting_step.py"], "torch-cpu and by_hand", "2"), "gpu": jobs["gpu"]}
    running, results = {}, {}
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    for name, (files, which, examples) in jobs.items():
        report, log = folder / f"{len(running)}.xml", folder / f"{len(running)}.log"
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # not -m pytest, which would put the checkout before the package
        command = [
            sys.executable,
            "-c",
            code,
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={report}",
            *files,
        ]
        command += ["-k", which] if which else []
        environment = {**os.environ, "CTS_FAST_EXAMPLES": examples, "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            running[name] = (started(command, output, cwd=ROOT / "tests", env=environment), report, log)
    deadline = time.monotonic() + float(os.environ[LIMIT]) - 8
    for name, (process, report, log) in running.items():
        if not ended(process, max(1, deadline - time.monotonic())):
            results[name] = {"error": "took too long", "tail": log.read_text(errors="replace")[-1500:]}
            continue
        results[name] = counts_of(report) | (
            {"tail": log.read_text(errors="replace")[-3000:]} if process.returncode else {}
        )
        if process.returncode or not results[name].get("tests"):
            results[name]["error"] = f"pytest exit code {process.returncode}"
        elif device == "cuda" and results[name]["skipped"] == results[name]["tests"]:
            results[name]["error"] = "every test was skipped"
        so_far({"processes": results})
    if LOGS in os.environ:
        with Path(os.environ[LOGS]).open("w") as kept:
            for name, (_, _, log) in running.items():
                kept.write(f"== {name}\n{log.read_text(errors='replace')[-1_000_000:]}\n")
    shutil.rmtree(folder)
    broken = [name for name, result in results.items() if "error" in result]
    return {"processes": results, **({"error": f"tests failed: {', '.join(broken)}"} if broken else {})}


def counts_of(report: Path) -> dict:
    """Numbers of tests, failures, errors and skips of a JUnit file, and the reasons for skips."""
    if not report.exists():
        return {}
    tree = xml.etree.ElementTree.parse(report)
    suites = list(tree.iter("testsuite"))
    numbers = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    return numbers | {"skips": sorted({skip.get("message", "")[:120] for skip in tree.iter("skipped")})}


def sanitizers(device: str) -> dict:
    """compute-sanitizer's tools on a small case; where the machine refuses it, that is the result."""
    tool = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or device == "cpu":
        return {"refused": "compute-sanitizer was not found" if tool is None else "a dry run"}
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }  # each tensor an allocation, whose end a tool can see
    results = {}
    deadline = time.monotonic() + float(os.environ[LIMIT]) - 8
    for names in (("memcheck",), ("racecheck", "initcheck")):  # the first alone, so that it surely ends
        running = {}
        for name in names:
            # not CUDA's API errors: torch and the driver ask for functions that may not be there
            command = [
                tool,
                "--tool",
                name,
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "9",
                sys.executable,
                str(Path(__file__).resolve()),
            ]
            log = tempfile.TemporaryFile("w+", errors="replace")
            running[name] = started([*command, "--section", "small"], log, env=environment), log
        for name, (process, log) in running.items():
            in_time = ended(process, deadline - time.monotonic())
            with log:
                log.seek(0)
                output = log.read()
            results[name] = (
                sanitized(process.returncode, output)
                if in_time
                else {"refused": "took too long", "tail": output[-1500:]}
            )
            so_far({"tools": results})
    broken = [name for name, result in results.items() if "exit code" in result]
    return {"tools": results, **({"error": f"sanitizer reports: {', '.join(broken)}"} if broken else {})}


def sanitized(status: int, output: str) -> dict:
    """What a sanitizer found, or why the machine refused it."""
    if status == 0 and re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", output):
        return {"errors": 0}
    if re.search(r"not supported|Unable to|Internal Sanitizer Error|Failed to initialize", output):
        return {"refused": output[-1500:]}
    return {"exit code": status, "tail": output[-3000:]}


def profiler(device: str) -> dict:
    """What Nsight Compute counts in one step of a few set-ups; where the machine refuses it, that is the result."""
    from benchmarks.gpu.measure import METRICS, PROFILED

    tool = shutil.which("ncu") or next(map(str, Path("/usr/local").glob("cuda*/bin/ncu")), None)
    if tool is None or device == "cpu":
        return {"refused": "ncu was not found" if tool is None else "a dry run"}
    command = [
        tool,
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
        "--csv",
        "--print-units",
        "base",
        "--metrics",
        ",".join(METRICS),
    ]
    command += [
        "--kernel-name",
        "regex:shifting_step",
        sys.executable,
        str(Path(__file__).resolve()),
        "--section",
        "profiled",
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        in_time = ended(started(command, log), float(os.environ[LIMIT]) - 5)
        log.seek(0)
        lines = log.read().splitlines()
    table = list(csv.DictReader(line for line in lines if line.startswith('"')))
    launches: dict[str, dict] = {}
    for row in table:
        launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    if not launches:
        return {"refused": "\n".join(lines)[-1500:] if in_time else "took too long"}
    return {
        "launches": {
            f"{network}, T = {tasks}": launch
            for (network, tasks), launch in zip(PROFILED, launches.values(), strict=False)
        }
    }


def small(device: str) -> dict:
    """A few steps of the cuda backend with everything in them; what the sanitizers watch."""
    import torch

    from cts_fast import ShiftingMetaOptimizer

    for tasks, dtype, capturable in [(3, torch.float32, False), (8, torch.bfloat16, True), (17, torch.float32, True)]:
        shapes = [(5, 3), (129,), (1030,)]
        params = [
            [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes] for _ in range(tasks)
        ]
        heads = [[torch.nn.Parameter(torch.randn(t + 1, device=device).to(dtype))] for t in range(tasks)]
        for task in params[1:]:
            for p, q in zip(task, params[0], strict=True):
                p.data.copy_(q)
        opt = ShiftingMetaOptimizer(
            params,
            lr=0.1,
            momentum=0.9,
            dampening=0.5,
            meta_lr=0.1,
            horizon=2,
            heads=heads,
            capturable=capturable,
            backend="cuda",
        )
        for step in range(3):
            for t, task in enumerate([*params, *heads]):
                for p in task:
                    p.grad = None if t == step else torch.randn(p.numel() + 1, device=device).to(dtype)[1:].view_as(p)
            opt.step()
    torch.cuda.synchronize()
    return {}


# Results -----------------------------------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """The results as text."""
    sections, lines = results["sections"], [f"{results['machine'].get('name')}, {results['date']}", ""]
    for name, result in sections.get("tests", {}).get("processes", {}).items():
        shown = [key for key in ("tests", "failures", "errors", "skipped", "error") if key in result]
        lines.append(f"tests, {name}: " + ", ".join(f"{key} {result[key]}" for key in shown))
    for name, result in (
        sections.get("sanitizers", {}).get("tools", {"compute-sanitizer": sections.get("sanitizers", {})}).items()
    ):
        lines.append(
            f"sanitizer, {name}: "
            + json.dumps({key: str(value)[:100] for key, value in result.items() if key != "seconds"})
        )
    for name, result in sections.get("counts", {}).get("steps", {}).items():
        lines.append(f"a step, {name}: " + ", ".join(f"{key} {value:g}" for key, value in result.items()))
    rate = sections.get("bandwidth", {}).get("bytes_per_second")
    if rate:
        lines += [f"copy bandwidth: {rate / 1e12:.3f} TB/s", ""]
    rows, l2 = sections.get("steps", {}).get("rows", []), results["machine"].get("l2_bytes", 0)
    lines += [
        "cold, warm: device time with cold and warm L2; host: until the call returns; row: a step in a row of steps; of copy: the bytes that a",
        "step must move, in the cold time, over the copy bandwidth; times: cold time over that of the first variant of its network and T.",
        "notes: L2: part of these bytes stays in the L2 cache from step to step, also in cold ones, so its share of copy is no share of memory's;",
        "host: the host takes longer to launch a step than the device to run it, so a row of steps is bound by it.",
        f"{'network':10} {'T':>4} {'variant':26} {'cold µs':>10} {'warm µs':>10} {'host µs':>10} {'row µs':>10} {'of copy':>8} {'times':>8}  notes",
    ]
    ours: dict[tuple, float] = {}
    for row in rows:
        start = f"{row['network']:10} {row['tasks']:4} {row['variant']:26}"
        if "us" not in row:
            lines.append(f"{start} {row.get('error') or row.get('left out')}")
            continue
        cold, bytes_ = row["us"]["device_cold"], row.get("floor_bytes")
        share = f"{bytes_ / (1e-6 * cold) / rate:8.1%}" if rate and bytes_ else f"{'':8}"
        us = " ".join(f"{row['us'][key]:10.1f}" for key in ("device_cold", "device_warm", "host", "in_a_row"))
        times = cold / ours.setdefault((row["network"], row["tasks"]), cold)
        notes = ["L2"] * bool(bytes_ and bytes_ < 2 * l2) + ["host"] * (row["us"]["host"] > cold)
        lines.append(f"{start} {us} {share} {times:8.2f}  {', '.join(notes)}")
    for name, counted in sections.get("profiler", {}).get("launches", {}).items():
        lines += ["", f"Nsight Compute, {name}: " + ", ".join(f"{key} {value:g}" for key, value in counted.items())]
    if "refused" in sections.get("profiler", {}):
        lines += ["", f"Nsight Compute: {sections['profiler']['refused'][-200:]}"]
    lines.append("")
    for name, result in sections.get("training", {}).get("loops", {}).items():
        lines.append(
            f"training, {name}: "
            + (f"{result['steps_per_second']:.2f} steps/s" if "steps_per_second" in result else result["left out"])
        )
    lines += [f"FAILED {name}: {result['error']}" for name, result in sections.items() if "error" in result]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
