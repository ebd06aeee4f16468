"""Facts about the native modules: a file that is not what was built never reaches the loader, and what `_cpu` offers
beside the step."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine import native
from cts_fast.engine.rules.sgd import Hyper

CHECKOUT = Path(__file__).parents[2]
_cpu = pytest.importorskip("cts_fast._cpu", reason="the native module is not built")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="shared libraries are ELF files on Linux")


def test_the_optimizers_defaults_are_those_of_the_declaration():
    given = inspect.signature(ShiftingMetaOptimizer).parameters
    assert {name: given[name].default for name in Hyper._fields} == Hyper._field_defaults


def test_it_unpacks_a_param_group_in_the_order_of_its_declaration():
    assert _cpu.sgd_fields == Hyper._fields


# A module's file


@pytest.fixture
def file(tmp_path) -> Path:
    """A copy of the module, in a package that holds nothing but it and its loader."""
    folder = tmp_path / "cts_fast"
    (folder / "engine").mkdir(parents=True)
    shutil.copy(native.__file__, folder / "engine" / "native.py")
    for package in (folder, folder / "engine"):
        (package / "__init__.py").touch()
    return Path(shutil.copy(_cpu.__file__, folder))


def describe(file: Path, **other: object) -> None:
    """Write the description of the file as it is now."""
    content = file.read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "build": _cpu.build}
    Path(f"{file}.json").write_text(json.dumps({**facts, **other}))


def loaded(file: Path, name: str = "_cpu") -> str:
    """What `load` says in a process of its own, twice: the module's file, or the exception."""
    program = (
        "from cts_fast.engine import native\n"
        "for _ in range(2):\n"
        f"    try: print(native.load({name!r}).__file__)\n"
        "    except ImportError as error: print(type(error).__name__, error)"
    )
    root = file.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result
    first, again = result.stdout.splitlines()
    assert first == again
    return first


def check_broken(file: Path, why: str) -> None:
    """It is broken, for that reason, and the message says what to do."""
    said = loaded(file)
    assert said.startswith("Broken broken: ") and why in said, said
    assert said.endswith("; reinstall with CTS_FAST_BUILD=cpu")


def test_what_was_built_loads_with_and_without_its_description(file):
    assert loaded(file) == str(file)
    describe(file)
    assert loaded(file) == str(file)


@pytest.mark.parametrize(("name", "needs"), [("_cpu", "cpu and a C++ compiler"), ("_cuda", "cuda and nvcc")])
def test_a_module_that_was_not_built_is_told_from_a_broken_one(file, name, needs):
    file.unlink()
    said = loaded(file, name)
    assert said.startswith("NotBuilt the native module is not there")
    assert f"reinstall with CTS_FAST_BUILD={needs}" in said


@pytest.mark.parametrize("described", [False, True])
def test_an_empty_file_is_broken(file, described):
    if described:
        describe(file)
    file.write_bytes(b"")
    check_broken(file, "empty")


@on_linux
def test_a_file_that_is_no_library_is_broken_without_a_description_too(file):
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 1000)
    check_broken(file, "no shared library")


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_file_cut_short_never_reaches_the_loader(file, part):
    describe(file)
    whole = file.stat().st_size
    os.truncate(file, int(whole * part))
    check_broken(file, f"cut short: {int(whole * part)} of {whole} bytes")


def test_a_file_of_the_same_size_with_other_bytes_is_broken(file):
    describe(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # as after a crash of the file system
    file.write_bytes(content)
    check_broken(file, "another checksum")


def test_a_file_that_grew_is_tried(file):
    describe(file)
    with open(file, "ab") as end:
        end.write(bytes(4096))
    assert loaded(file) == str(file)


def test_a_module_of_another_build_is_broken(file):
    describe(file, build="0123456789abcdef")
    check_broken(file, f"it is build {_cpu.build}, not 0123456789abcdef")


@pytest.mark.parametrize("text", ["", '{"bytes": 1', "[]", "{}"])
def test_a_damaged_description_is_no_permission(file, text):
    Path(f"{file}.json").write_text(text)
    check_broken(file, "damaged")


@pytest.mark.parametrize("described", [False, True])
def test_the_library_of_another_module_is_broken(file, described):
    other = importlib.util.find_spec("_ctypes").origin
    if not other or not other.endswith(".so"):
        pytest.skip("this Python's own modules are no files")
    shutil.copy(other, file)
    if described:
        describe(file)
    check_broken(file, "PyInit__cpu")


@on_linux
def test_a_library_that_misses_a_symbol_is_broken(file, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler was found")
    (tmp_path / "gone.c").write_text("void *gone(void); void *PyInit__cpu(void) { return gone(); }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", file, tmp_path / "gone.c"], check=True)
    check_broken(file, "gone")


@pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="no checkout around the tests")
def test_a_build_leaves_a_description_beside_the_module(tmp_path):
    pytest.importorskip("setuptools")
    pytest.importorskip("ninja")
    for name in ("csrc", "kernels", "cts_fast"):
        ignored = shutil.ignore_patterns("*.so*", "__pycache__", "*.bin")
        shutil.copytree(CHECKOUT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, tmp_path)
    compiler = tmp_path / "compiler"  # writes something to what stands behind -o
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n: > "$2.d"\n')
    compiler.chmod(0o755)
    (tmp_path / ".git").touch()  # a checkout
    environment = {**os.environ, "CXX": str(compiler), "CTS_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "build"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("_cpu*.so"))
    assert [path.parts[0] for path in built] == ["build", "cts_fast"]
    for path in built:
        facts = json.loads((tmp_path / f"{path}.json").read_text())
        assert facts["bytes"] == 6 and facts["sha256"] == hashlib.sha256(b"built\n").hexdigest()
        assert len(facts["build"]) == 16
    assert not list(tmp_path.rglob("*.new"))


# Lists, gradient tables and what a step notes


def test_same_objects_means_identity_and_order():
    a = [1.5, torch.ones(1), None]
    assert _cpu.same_objects(a, list(a)) and _cpu.same_objects([], [])
    assert not _cpu.same_objects(a, a[:2]) and not _cpu.same_objects(a, a[::-1])
    assert not _cpu.same_objects(a, [1.5, torch.ones(1), None])


SHAPES = [(3, 4), (1,), (), (5,), (2, 1, 3)]


def table_of(params: list) -> object:
    """A table for parameters that all have numbers."""
    layouts = [(tuple(p.shape), p.stride()) for p in params]
    like, negated = torch.zeros(2, 40, dtype=params[0].dtype), torch._neg_view(torch.ones(2))
    return _cpu.GradientTable([p.data_ptr() for p in params], layouts, like, negated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_whose_memory_does_not_hold_their_values_are_odd_in_any_shape(dtype):
    params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    table, every = table_of(params), list(range(len(SHAPES)))
    plain = [torch.ones_like(p) for p in params]
    offset = [torch._efficientzerotensor((p.numel() + 3,), dtype=dtype)[3:].view(p.shape) for p in params]
    odd = {
        "plain": plain,
        "negated twice": [torch._neg_view(torch._neg_view(g)) for g in plain],
        "negated": list(map(torch._neg_view, plain)),
        "zeros without memory": [torch._efficientzerotensor(p.shape, dtype=dtype) for p in params],
        "views of such zeros": offset,
        "imaginary part of a conjugate": [torch.zeros(p.shape, dtype=torch.complex64).conj().imag for p in params],
        "another dtype": [g.to(torch.int32) for g in plain],
    }
    found = {name: table.collect(params, gradients)[2] for name, gradients in odd.items()}
    assert found == {name: [] if name in ("plain", "negated twice") else every for name in odd}


def test_the_lazy_minus_is_read_from_memory_and_no_gradient_is_asked(monkeypatch):
    params = [torch.zeros(shape) for shape in SHAPES]
    monkeypatch.setattr(torch.Tensor, "is_neg", None)  # who asks fails
    for _ in range(20):
        table = table_of(params)
        assert table.collect(params, [torch._neg_view(torch.ones_like(p)) for p in params])[2] == [0, 1, 2, 3, 4]


def test_a_table_keeps_no_parameter_and_takes_as_many_as_it_was_made_for():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    table, gone = table_of(params), weakref.ref(params[0])
    assert table.collect(params)[1:] == (0, [], [])
    for wrong in (params[:2], [*params, params[0]], []):
        with pytest.raises(ValueError, match="one address for each parameter"):
            table.collect(wrong)
    assert not gc.is_tracked(table)
    del params, wrong
    assert gone() is None


class Notes:
    """A step of two shared segments of two tasks and of one head of each, on buffers of one number a tensor."""

    def __init__(self, present: list[bool], started: list[int], momentum: list[float]) -> None:
        self.phi, self.theta, self.v = torch.zeros(64), torch.zeros(2, 64), torch.zeros(2, 64)
        self.heads, self.head_v = torch.zeros(1, 64), torch.zeros(1, 64)
        flats = [
            (self.phi.data_ptr(), self.theta.data_ptr(), self.v.data_ptr(), 0, 64, 2),
            (0, self.heads.data_ptr(), self.head_v.data_ptr(), 0, 64, 1),
        ]
        segments = [[(0, 1, 0, 0), (32, 1, 1, 2)], [(0, 1, 2, 4), (32, 1, 2, 5)]]
        self.stepper = _cpu.Stepper(0, flats, segments, "plain")
        self.gradients = torch.ones(6)
        addresses = [self.gradients[i].data_ptr() if there else 0 for i, there in enumerate(present)]
        self.table = torch.tensor(addresses, dtype=torch.int64)
        self.started = torch.tensor(started, dtype=torch.uint8)
        self.counters = torch.zeros(5, dtype=torch.int64)
        self.hyper = [(0.5, m, 0.0, 0.0, False, False, 1.0, 1.0) for m in momentum]

    def step(self, control: tuple, after: bool = True, all_started: bool = False) -> list[int]:
        """The flags after a step."""
        counters = (self.counters.data_ptr(), (3, 4, 5, 6)) if after else None
        addresses = (self.table.data_ptr(), self.started.data_ptr())
        self.stepper.step(*addresses, all_started, 0, self.hyper, control, counters, None, False, 1)
        return self.started.tolist()


@pytest.mark.parametrize(
    ("momentum", "reset", "clears", "flags"),
    [
        ([0.9, 0.0, 0.9], False, True, [1, 0, 1, 0, 1, 0]),
        ([0.9, 0.5, 0.0], False, True, [1, 0, 1, 1, 0, 0]),
        ([0.9, 0.5, 0.9], True, False, [1, 0, 1, 1, 1, 0]),
        ([0.9, 0.5, 0.9], True, True, [0, 0, 0, 0, 1, 0]),  # heads are never reset
    ],
)
def test_a_step_notes_first_gradients_and_counters(momentum, reset, clears, flags):
    notes = Notes([True, False, True, True, True, False], [0, 0, 1, 0, 0, 0], momentum)
    assert notes.step((True, reset, clears, 2, 1.0)) == flags
    assert notes.counters.tolist() == [3, 4, 5, 6, 0]


def test_a_step_without_counters_writes_none_and_started_flags_stay():
    notes = Notes([True] * 6, [1] * 6, [0.9] * 3)
    assert notes.step((True, False, True, 2, 1.0), after=False, all_started=True) == [1] * 6
    assert notes.counters.tolist() == [0] * 5
    assert notes.step((True, True, True, 2, 1.0), all_started=True) == [0, 0, 0, 0, 1, 1]


def test_the_number_of_tasks_of_the_mean_is_an_argument():
    moved = {}
    for num_tasks in (2, 8):
        notes = Notes([True] * 6, [0] * 6, [0.0] * 3)
        notes.step((True, False, True, num_tasks, 1.0))
        moved[num_tasks] = notes.phi[0].item()
        assert notes.heads[0, 0].item() == -0.5
    assert moved == {2: -0.5, 8: -0.125}


# What "auto" says


TWO_OPTIMIZERS = """
import warnings, torch
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    from cts_fast import ShiftingMetaOptimizer
    opts = [ShiftingMetaOptimizer([[torch.nn.Parameter(torch.ones(3))]], lr=1.0, meta_lr=0.0) for _ in range(2)]
    p = opts[0].param_groups[0]["params"][0]
    p.grad = torch.ones(3)
    opts[0].step()
print(opts[0].backend, p.tolist(), len(heard), *[warning.message for warning in heard])
"""


def told(path: Path, **environment: str) -> str:
    """What two optimizers with backend "auto" say, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    command = [sys.executable, "-c", TWO_OPTIMIZERS]
    result = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_auto_passes_over_a_cut_module_with_one_warning(tmp_path):
    package = Path(importlib.util.find_spec("cts_fast").origin).parent
    shutil.copytree(package, tmp_path / "cts_fast", ignore=shutil.ignore_patterns("*.so", "*.bin", "*.png"))
    whole = Path(_cpu.__file__).read_bytes()
    (tmp_path / "cts_fast" / Path(_cpu.__file__).name).write_bytes(whole[: len(whole) // 2])
    shutil.copy(_cpu.__file__ + ".json", tmp_path / "cts_fast")
    out = told(tmp_path)
    assert out.startswith("torch [0.0, 0.0, 0.0] 1 the 'cpu' backend is off, and 'torch' runs in its place: broken: ")
    assert "CTS_FAST_BUILD=cpu" in out


def test_auto_warns_of_an_unknown_instruction_set():
    out = told(Path(importlib.util.find_spec("cts_fast").origin).parents[1], CTS_FAST_ISA="avx1024")
    assert out.startswith(
        "torch [0.0, 0.0, 0.0] 1 the 'cpu' backend is off, and 'torch' runs in its place: CTS_FAST_ISA='avx1024'"
    )
