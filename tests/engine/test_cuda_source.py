"""The CUDA source without a GPU: the step's tests on it, compiled for the CPU, and what nvcc made of it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import cts_fast
from cts_fast.engine.rules.sgd import Hyper

SUPPORT = Path(__file__).parents[1] / "support"
pytest.importorskip("pybind11")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="g++ was not found")


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["test_shifting_step.py", "test_step_in_halves.py", "test_counted_steps.py", "test_cuda_backend.py"]
)
def test_the_step_is_right_under_sanitizers(shim, file):
    named = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in named]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CTS_FAST_EXAMPLES": "10",
    }
    options = ["-q", "-p", "no:cacheprovider", file, "-k", "cuda-cpu"]
    command = [sys.executable, str(SUPPORT / "shim_step.py"), str(shim), *options]
    out = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert out.returncode == 0 and re.search(r"\d+ passed", out.stdout), out.stdout[-4000:] + out.stderr[-4000:]
    assert "failed" not in out.stdout and "skipped" not in out.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """csrc/cuda/shifting_step.cu as a module for CPU tensors."""
    folder = tmp_path_factory.mktemp("shim")
    command = ["sh", str(SUPPORT / "build_shim.sh"), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable})
    return folder / "_cuda.so"


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump, of Triton's wheel or the toolkit, says."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path("/")
    tool = str(inside) if inside.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump was not found; it comes with triton")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def module() -> str:
    """The built module's path."""
    try:
        spec = importlib.util.find_spec("cts_fast._cuda")
    except ValueError:  # another module stands in its place
        spec = None
    if spec is None or not spec.origin:
        pytest.skip("cts_fast._cuda is not built: no nvcc when the package was installed")
    return spec.origin


class Kernel(NamedTuple):
    """Which of the compiled kernels."""

    architecture: int
    lean: bool
    held: int  # tasks of a thread
    slices: str  # of the tasks, in which blocks split them
    dtype: str  # the parameters'
    pointers: int  # addresses by value

    @classmethod
    def of(cls, architecture: int, name: str) -> Kernel:
        kind = re.search(r"shifting_stepILb(\d)ELi(\d+)ELNS\w+?6SlicesE(\d)E(\w+?)Li(\d+)E", name)
        assert kind, f"a kernel that is not the step: {name}"
        return cls(architecture, kind[1] == "1", int(kind[2]), SLICES[int(kind[3])], TYPES[kind[4]], int(kind[5]))

    @property
    def sliced(self) -> bool:
        return self.slices != "none"


SLICES = ("none", "full", "any")  # csrc/cuda/tiles.h
TYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
KINDS = [(1, "none"), (2, "none"), (4, "none"), (8, "none"), (8, "any")]  # (tasks a thread holds, slices)
LEAN = [*KINDS, (8, "full")]  # of lean kernels


class Half(NamedTuple):
    """Which of the kernels that do half a step, each for any number of tasks."""

    architecture: int
    name: str
    dtype: str

    @classmethod
    def of(cls, architecture: int, name: str) -> Half | None:
        kind = re.search(r"\d(partial_step|finish_step)I(f|d|13__nv_bfloat16|6__half)L", name)
        return cls(architecture, kind[1], TYPES[kind[2]]) if kind else None


@pytest.fixture(scope="module")
def resources(module) -> dict[Kernel | Half, tuple[int, int, int]]:
    """Kernel → (registers, stack bytes, local bytes)."""
    found, architecture = {}, None
    for line in cuobjdump("--dump-resource-usage", module).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            kernel = Half.of(architecture, name) or Kernel.of(architecture, name)
            found[kernel] = tuple(map(int, match.groups()))
    return found


@pytest.fixture(scope="module")
def usage(resources) -> dict[Kernel, tuple[int, int, int]]:
    """Those of the whole step."""
    return {kernel: value for kernel, value in resources.items() if isinstance(kernel, Kernel)}


def test_both_halves_have_a_kernel_for_every_dtype_and_spill_nothing(resources):
    architectures = {kernel.architecture for kernel in resources}
    halves = {kernel: value for kernel, value in resources.items() if isinstance(kernel, Half)}
    every = itertools.product(architectures, ("partial_step", "finish_step"), TYPES.values())
    assert set(halves) == {Half(*one) for one in every}
    assert all(value[1:] == (0, 0) and value[0] <= 128 for value in halves.values()), halves


def test_every_architecture_dtype_and_number_of_tasks_has_its_kernels(usage):
    architectures = {kernel.architecture for kernel in usage}
    assert architectures
    expected = {(a, False, *kind, d, 3200) for a, kind, d in itertools.product(architectures, KINDS, TYPES.values())}
    expected |= {(a, True, *kind, d, 3200) for a, kind, d in itertools.product(architectures, LEAN, TYPES.values())}
    expected |= {(a, True, *kind, "float32", 512) for a in architectures for kind in LEAN}  # small launches
    assert set(usage) == expected


def test_no_kernel_spills(usage):
    # stack and local memory are 0 where nothing was spilled and no array was indexed at run time
    assert {kernel: value for kernel, value in usage.items() if value[1:] != (0, 0)} == {}


def test_registers_are_within_the_launch_bounds(usage):
    for kernel, (registers, _, _) in usage.items():
        threads = 512 if kernel.sliced else 128
        blocks = 65536 // (-(-registers // 8) * 8 * threads)
        if kernel.sliced:
            assert blocks >= 1, kernel
        elif kernel.held == 8:
            assert registers <= 128 and blocks >= 4, kernel
            if kernel.lean and kernel.architecture == 90 and kernel.dtype in ("float32", "float64"):
                assert blocks >= 5, kernel
        else:
            assert blocks >= (5 if kernel.held == 4 else 7), kernel


def instructions(text: str) -> list[str]:
    """A kernel's instructions without their guards, padding left out."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    return [one for one in found if one != "NOP"]


@pytest.fixture(scope="module", params=[80, 90, 100])
def code(request, module, usage) -> dict[Kernel, list[str]]:
    """Kernel → its instructions, of one architecture."""
    architecture = request.param
    if architecture not in {kernel.architecture for kernel in usage}:
        pytest.skip(f"not built for sm_{architecture}")
    text = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}", module)
    _, *parts = re.split(r"\n\s*Function : ", text)
    whole = [part for part in parts if Half.of(architecture, part.split()[0]) is None]
    return {Kernel.of(architecture, part.split()[0]): instructions(part) for part in whole}


def widths(found: list[str], kinds: str) -> list[int]:
    """Bits of every access of these kinds: "LDG", "STG", "LDS|STS"."""
    accesses = [one for one in found if re.match(rf"({kinds})\b", one)]
    return [int(size[1]) if (size := re.search(r"\.[SU]?(8|16|64|128)\b", one)) else 32 for one in accesses]


@pytest.mark.slow
def test_numbers_move_16_bytes_at_a_time_and_never_in_bytes(code):
    for kernel, found in code.items():
        assert not [one for one in found if re.match(r"(LDL|STL)\b", one)], kernel
        if kernel.dtype not in ("float32", "float64"):
            continue
        # bytes: first-gradient flags by address, nothing through generic pointers, nothing in shared memory
        assert not [one for one in found if re.match(r"(LD|ST|LDS|STS)\.(?!.*128)(.*\.)?[SU]?(8|16)\b", one)], kernel
        assert 16 not in widths(found, "LDG|STG"), kernel
        held = 1 if kernel.slices == "any" else kernel.held  # of any slice the number is known at run time alone
        # theta, momentum and gradient of every task, phi and the tile in; theta, momentum and phi out, with and without
        # staying in the cache
        assert widths(found, "LDG").count(128) >= 3 * held + 1 + 2, kernel
        assert widths(found, "STG").count(128) >= 2 * (2 * held + 1), kernel
        if kernel.sliced:
            assert 128 in widths(found, "LDS") and 128 in widths(found, "STS"), kernel


@pytest.mark.slow
def test_lean_kernels_load_several_tasks_before_they_store_the_first(code):
    for kernel, found in code.items():
        if not kernel.lean or kernel.held != 8 or kernel.dtype not in ("float32", "float64"):
            continue
        wide = "".join(one[0] for one in found if re.match(r"(LDG|STG)\S*\.128", one))
        tasks = {("full", "float32"): 4, ("any", "float64"): 1}.get((kernel.slices, kernel.dtype), 2)
        assert max(map(len, wide.split("S"))) >= 3 * tasks, kernel  # theta, momentum and gradient of each


@pytest.mark.slow
def test_the_lean_path_of_8_tasks_is_short(code):
    for kernel, found in code.items():
        if not kernel.lean or kernel.sliced or kernel.held != 8 or kernel.dtype not in ("float32", "float64"):
            continue
        # from the kernel's first instruction to the last wide store; behind it come the columns left over and those of
        # heads, one by one
        last = max(i for i, one in enumerate(found) if re.match(r"STG\S*\.128", one))
        assert last <= 1200, kernel
        assert len(found) <= 1750, kernel


@pytest.mark.slow
def test_a_ticket_is_taken_before_anything_is_stored(code):
    for kernel, found in code.items():
        tickets = [i for i, one in enumerate(found) if one.startswith("ATOMG")]
        stores = [i for i, one in enumerate(found) if re.match(r"STG\S*\.128", one)]
        assert len(tickets) == (1 if kernel.lean else 2), kernel  # steps that read the flags take theirs at the end
        assert tickets[0] < stores[0], kernel


def test_the_module_imports_without_a_driver(module):
    code = "import cts_fast._cuda as m; print(m.driver_version())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.returncode == 0 and int(out.stdout) >= 0, out.stderr
    needed = subprocess.run(["ldd", module], capture_output=True, text=True).stdout
    assert "libcuda" not in needed and "libcudart" not in needed and "torch" not in needed


def test_it_unpacks_a_param_group_in_the_order_of_its_declaration_and_is_of_this_version(module):
    from cts_fast import _cpu, _cuda

    assert _cuda.sgd_fields == Hyper._fields
    assert re.fullmatch("[0-9a-f]{16}", _cpu.build) and re.fullmatch("[0-9a-f]{16}", _cuda.build)
    assert _cpu.build != _cuda.build and _cpu.version == _cuda.version == cts_fast.__version__
