"""Everything that only a GPU can show, section by section: python benchmarks/gpu/check.py [--device cpu].

`--device cpu` is a dry run of what needs no GPU. Sections run in processes of their own, so that one that crashes or
hangs costs no other one, and of its own results only those to come; what is known is written after each of them to
benchmarks/results/<device>-<date>.json. Exit code 1 if a section failed. benchmarks/gpu_check.sh builds the package
first.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
others = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"]
sys.path = [*others, str(ROOT)]  # the installed package comes first

from benchmarks.gpu import forms as forms_of_kernels  # noqa: E402
from benchmarks.gpu import machine, measure, training  # noqa: E402
from benchmarks.gpu.results import hand_over, last_result, table  # noqa: E402

# their shares of the time
SECTIONS = dict(bandwidth=10, steps=70, training=70, tests=90, counts=25, profiler=35, sanitizers=40)
MORE = dict(forms=90)  # run where --only names them
FORM = "GPU_CHECK_FORM"  # the module that a process measures in the place of the built one
LIMIT = "GPU_CHECK_SECONDS"  # what is left for a section, in its process's environment
LOGS = "GPU_CHECK_LOGS"  # where the tests' whole output goes


def main() -> int:
    """Run all sections, or with --section one of them here, which prints its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run on small problems")
    parser.add_argument("--section", choices=tuple(functions()), help="run one section in this process")
    parser.add_argument(
        "--only", nargs="*", choices=(*SECTIONS, *MORE), default=tuple(SECTIONS), help="the sections to run"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    together = "for all sections together; later ones share what earlier ones left"
    parser.add_argument("--seconds", type=float, default=300, help=together)
    parser.add_argument("--build-log", type=Path, help="what the build said; kept with the results")
    arguments = parser.parse_args()
    if arguments.section:
        hand_over(functions()[arguments.section](arguments.device))
        return 0
    return run_all(arguments)


def functions() -> dict[str, Callable[[str], dict]]:
    """Section → what runs it; more than SECTIONS has: what these run in turn."""
    own = dict(tests=tests, sanitizers=sanitizers, small=small, profiler=profiler, forms=forms, form=form)
    measured = dict(bandwidth=measure.bandwidth, steps=measure.steps, counts=measure.counts, profiled=measure.profiled)
    return dict(machine=machine.describe, training=training.training, **own, **measured)


def run_all(arguments) -> int:
    """The machine, then each section; writes after each one."""
    deadline = time.monotonic() + arguments.seconds
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": arguments.device,
        "revision": revision(),
        "sections": {},
    }
    results["machine"] = subprocess_json("machine", arguments.device, 60)
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
        shares = SECTIONS | MORE
        share = shares[section] / sum(shares[one] for one in arguments.only[i:])
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


def subprocess_json(section: str, device: str, seconds: float) -> dict:
    """A section's result from a process of its own; with an "error" if it failed, crashed or took too long."""
    command = [sys.executable, str(Path(__file__).resolve()), "--section", section, "--device", device]
    if seconds < 5:
        return {"error": "no time was left for it"}
    files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
    with files[0] as stdout, files[1] as stderr:
        process = started(command, stdout, stderr, cwd=ROOT.anchor, env={**os.environ, LIMIT: str(seconds)})
        in_time = ended(process, seconds)
        output, errors = (file.seek(0) or file.read() for file in files)
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


# Tests and sanitizers -------------------------------------------------------------------------------------------------


class PytestRun(NamedTuple):
    """What one process of pytest runs."""

    files: tuple[str, ...]
    which: str  # for -k
    examples: int  # of each property test


def pytest_runs(device: str) -> dict[str, PytestRun]:
    """The step's tests on every backend, in a few processes."""
    step, counted = ("engine/test_shifting_step.py",), ("engine/test_counted_steps.py",)
    halves, ranks = ("engine/test_step_in_halves.py",), "gpu/test_gpu_ranks.py"
    gpu = PytestRun(("gpu/test_gpu.py", "gpu/test_gpu_data.py", ranks), "not triton", 1)
    if device == "cpu":
        return {"torch": PytestRun(step, "torch-cpu and by_hand", 2), "gpu": gpu}
    dtypes = {name: name for name in ("float32", "float64", "bfloat16")} | {"float16": "float16 and not bfloat16"}
    any_number = {
        f"triton, {name}": PytestRun(step, f"triton-cuda and any_number and {which}", 1)
        for name, which in dtypes.items()
    }
    return {
        "cuda": PytestRun((*step, *counted, "engine/test_cuda_backend.py"), "cuda-cuda", 15),
        # Triton compiles a kernel for every number of tasks, dtype and set of options: several processes
        **any_number,
        "triton, the rest": PytestRun(step, "triton-cuda and not any_number", 3),
        "triton, counted": PytestRun(counted, "triton-cuda", 3),
        "halves": PytestRun(halves, "cuda-cuda", 1),
        "halves, triton": PytestRun(halves, "triton-cuda and (float32 or bit_equal)", 1),
        "triton, table": PytestRun(("engine/test_triton_backend.py",), "table or alignment", 1),
        "torch": PytestRun(step, "torch-cuda", 8),
        "gpu": gpu,
        "gpu, triton": PytestRun(("gpu/test_gpu.py", ranks), "triton", 1),
        "continuation": PytestRun(("experiments/test_continuation.py",), "on_a_gpu", 1),
        "source": PytestRun(("engine/test_cuda_source.py",), "not sanitizers", 1),
    }


def tests(device: str) -> dict:
    """All of `pytest_runs` side by side; a failure of one is a failure of the section."""
    running, results = {}, {}
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    # not -m pytest, which would put the checkout before the package
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    for name, (files, which, examples) in pytest_runs(device).items():
        report, log = folder / f"{len(running)}.xml", folder / f"{len(running)}.log"
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        command = [sys.executable, "-c", code, *options, *files, "-k", which]
        environment = {**os.environ, "CTS_FAST_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            running[name] = (started(command, output, cwd=ROOT / "tests", env=environment), report, log)
    deadline = time.monotonic() + float(os.environ[LIMIT]) - 8
    for name, (process, report, log) in running.items():
        in_time = ended(process, max(1, deadline - time.monotonic()))
        said = log.read_text(errors="replace")
        if in_time:
            results[name] = tested(process.returncode, report, said, device)
        else:
            results[name] = {"error": "took too long", "tail": said[-1500:]}
        hand_over({"processes": results})
    if LOGS in os.environ:
        with Path(os.environ[LOGS]).open("w") as kept:
            for name, (_, _, log) in running.items():
                kept.write(f"== {name}\n{log.read_text(errors='replace')[-1_000_000:]}\n")
    shutil.rmtree(folder)
    broken = [name for name, result in results.items() if "error" in result]
    return {"processes": results, **({"error": f"tests failed: {', '.join(broken)}"} if broken else {})}


def tested(status: int, report: Path, said: str, device: str) -> dict:
    """What a process of pytest found."""
    result = counts_of(report) | ({"tail": said[-3000:]} if status else {})
    if status or not result.get("tests"):
        result["error"] = f"pytest exit code {status}"
    elif device == "cuda" and result["skipped"] == result["tests"]:
        result["error"] = "every test was skipped"
    return result


def counts_of(report: Path) -> dict:
    """Numbers of tests, failures, errors and skips of a JUnit file, and the reasons for skips."""
    if not report.exists():
        return {}
    tree = xml.etree.ElementTree.parse(report)
    suites = list(tree.iter("testsuite"))
    kinds = ("tests", "failures", "errors", "skipped")
    numbers = {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds}
    return numbers | {"skips": sorted({skip.get("message", "")[:120] for skip in tree.iter("skipped")})}


def sanitizers(device: str) -> dict:
    """compute-sanitizer's tools on a small case; where the machine refuses it, that is the result."""
    found = map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    tool = shutil.which("compute-sanitizer") or next(found, None)
    if tool is None or device == "cpu":
        return {"refused": "compute-sanitizer was not found" if tool is None else "a dry run"}
    # each tensor an allocation, whose end a tool can see
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(__file__).resolve()), "--section", "small"]
    results = {}
    deadline = time.monotonic() + float(os.environ[LIMIT]) - 8
    for names in (("memcheck",), ("racecheck", "initcheck")):  # the first alone, so that it surely ends
        running = {}
        for name in names:
            # not CUDA's API errors: torch and the driver ask for functions that may not be there
            options = ["--tool", name, "--report-api-errors", "no", "--error-exitcode", "9"]
            log = tempfile.TemporaryFile("w+", errors="replace")
            running[name] = started([tool, *options, *program], log, env=environment), log
        for name, (process, log) in running.items():
            in_time = ended(process, deadline - time.monotonic())
            with log:
                log.seek(0)
                output = log.read()
            if in_time:
                results[name] = sanitized(process.returncode, output)
            else:
                results[name] = {"refused": "took too long", "tail": output[-1500:]}
            hand_over({"tools": results})
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
    tool = shutil.which("ncu") or next(map(str, Path("/usr/local").glob("cuda*/bin/ncu")), None)
    if tool is None or device == "cpu":
        return {"refused": "ncu was not found" if tool is None else "a dry run"}
    options = "--profile-from-start off --clock-control none --csv --print-units base".split()
    options += ["--metrics", ",".join(measure.METRICS), "--kernel-name", "regex:shifting_step"]
    command = [tool, *options, sys.executable, str(Path(__file__).resolve()), "--section", "profiled"]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        in_time = ended(started(command, log), float(os.environ[LIMIT]) - 5)
        log.seek(0)
        lines = log.read().splitlines()
    table = list(csv.DictReader(line for line in lines if line.startswith('"')))
    launches: dict[str, dict] = {}
    for row in table:
        launches.setdefault(row["ID"], {})[measure.METRICS[row["Metric Name"]]] = float(
            row["Metric Value"].replace(",", "")
        )
    if not launches:
        return {"refused": "\n".join(lines)[-1500:] if in_time else "took too long"}
    profiled = zip(measure.PROFILED, launches.values(), strict=False)
    return {"launches": {f"{network}, T = {tasks}": launch for (network, tasks), launch in profiled}}


def forms(device: str) -> dict:
    """Each form of the kernels that lies in the folder FORMS, in a process of its own: rows as those of the steps."""
    folder = Path(os.environ.get("FORMS", "no folder"))
    modules = [path for name in forms_of_kernels.FORMS if (path := forms_of_kernels.file_of(name, folder)).exists()]
    if not modules or device == "cpu":
        return {"refused": "FORMS names no folder of modules" if not modules else "a dry run"}
    deadline, rows, broken = time.monotonic() + float(os.environ[LIMIT]) - 5, [], []
    for i, module in enumerate(modules):
        os.environ[FORM] = str(module.resolve())
        result = subprocess_json("form", device, (deadline - time.monotonic()) / (len(modules) - i))
        rows += result.get("rows", [])
        broken += [f"{module.name}: {result['error']}"] if "error" in result else []
        hand_over({"rows": rows})
    return {"rows": rows, **({"error": "; ".join(broken)} if broken else {})}


def form(device: str) -> dict:
    """One form: checked, then measured."""
    module = Path(os.environ[FORM])
    forms_of_kernels.use(module)
    which = [(problem, "step(), cuda", module.name.partition(".")[0]) for problem in forms_of_kernels.PROBLEMS]
    return measure.timed_steps(which, device, checked=[("resnet20", 16), ("resnet20", 32)])


def small(device: str) -> dict:
    """A few steps of the cuda backend with everything in them; what the sanitizers watch."""
    import torch

    from cts_fast import ShiftingMetaOptimizer

    for tasks, dtype, capturable in [(3, torch.float32, False), (8, torch.bfloat16, True), (17, torch.float32, True)]:
        shapes = [(5, 3), (129,), (1030,)]

        def parameter(*shape: int, dtype=dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))

        params = [[parameter(*shape) for shape in shapes] for _ in range(tasks)]
        heads = [[parameter(t + 1)] for t in range(tasks)]
        for task in params[1:]:
            for p, q in zip(task, params[0], strict=True):
                p.data.copy_(q)
        options = dict(lr=0.1, momentum=0.9, dampening=0.5, meta_lr=0.1, horizon=2, capturable=capturable)
        opt = ShiftingMetaOptimizer(params, heads=heads, backend="cuda", **options)
        for step in range(3):
            for t, task in enumerate([*params, *heads]):
                for p in task:
                    p.grad = None if t == step else torch.randn(p.numel() + 1, device=device).to(dtype)[1:].view_as(p)
            opt.step()
    torch.cuda.synchronize()
    return {}


if __name__ == "__main__":
    sys.exit(main())
