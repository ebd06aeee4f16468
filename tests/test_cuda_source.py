"""The CUDA source without a GPU: the step's tests on it, compiled for the CPU under sanitizers, and what nvcc made of it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("pybind11")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="g++ was not found")


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_shifting_step.py", "test_counted_steps.py", "test_cuda_backend.py"])
def test_the_step_is_right_under_sanitizers(shim, file):
    named = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in named]
    environment = {
        **os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "CTS_FAST_EXAMPLES": "10",
    }  # fmt: skip
    command = [sys.executable, "shim_step.py", str(shim), "-q", "-p", "no:cacheprovider", file, "-k", "cuda-cpu"]
    out = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert out.returncode == 0 and re.search(r"\d+ passed", out.stdout), out.stdout[-4000:] + out.stderr[-4000:]
    assert "failed" not in out.stdout and "skipped" not in out.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """csrc/shifting_step.cu as a module for CPU tensors."""
    folder = tmp_path_factory.mktemp("shim")
    subprocess.run(["sh", str(HERE / "build_shim.sh"), str(folder)], check=True, env={**os.environ, "PYTHON": sys.executable})
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


@pytest.fixture(scope="module")
def usage(module) -> dict:
    """(architecture, parameter type, tasks in registers or 0, pointers) → (registers, stack bytes, local bytes)."""
    found, architecture = {}, None
    text = cuobjdump("--dump-resource-usage", module)
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            kind = re.search(r"shifting_stepI(\w+?)Li(\d+)ELi(\d+)", name)
            assert kind, f"a kernel that is not the step: {name}"
            found[architecture, kind[1], int(kind[2]), int(kind[3])] = tuple(map(int, match.groups()))
    return found


def test_every_architecture_dtype_and_number_of_tasks_has_its_kernel(usage):
    architectures = {key[0] for key in usage}
    assert {80, 90} <= architectures
    types = {"f", "d", "13__nv_bfloat16", "6__half"}
    assert {(key[1], key[2]) for key in usage} == {(p, n) for p in types for n in (0, 1, 2, 4, 8, 16)}
    assert len(usage) == len(architectures) * (6 * len(types) + 6)  # float32 has each for small launches too


def test_no_kernel_spills(usage):
    # stack and local memory are 0 where nothing was spilled and no array was indexed at run time
    assert {key: value for key, value in usage.items() if value[1:] != (0, 0)} == {}


def test_registers_leave_room_for_48_kib_in_flight(usage):
    for (architecture, _, tasks, _), (registers, _, _) in usage.items():
        in_flight = (3 * (tasks or 8) + 1) * 16 * 128  # bytes a block of 128 threads loads before its first use; more than 16 tasks: chunks of 8
        blocks = 65536 // (-(-registers // 8) * 8 * 128)
        assert blocks * in_flight >= 48 << 10 or tasks <= 2 and blocks >= 8, (architecture, tasks, registers)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_step_of_8_tasks_moves_16_bytes_at_a_time(module, usage, architecture):
    if architecture not in {key[0] for key in usage}:
        pytest.skip(f"this nvcc did not build for sm_{architecture}")
    text = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}", module)
    (kernel,) = [part for part in re.split(r"\n\s*Function : ", text) if re.match(r"\S*shifting_stepIfLi8ELi512", part)]
    wide = {kind: len(re.findall(rf"\b{kind}\.E(?:\.\w+)*\.128\b", kernel)) for kind in ("LDG", "STG")}
    # twice, for the plain rule and for every option: theta, momentum and gradient of 8 tasks and phi in; theta, momentum and phi out
    assert wide["LDG"] >= 2 * (3 * 8 + 1) and wide["STG"] >= 2 * (2 * 8 + 1)
    assert not re.search(r"\b(LDL|STL)\b", kernel)


def test_the_module_imports_without_a_driver(module):
    code = "import cts_fast._cuda as m; print(m.driver_version())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert out.returncode == 0 and int(out.stdout) >= 0, out.stderr
    needed = subprocess.run(["ldd", module], capture_output=True, text=True).stdout
    assert "libcuda" not in needed and "libcudart" not in needed and "torch" not in needed
