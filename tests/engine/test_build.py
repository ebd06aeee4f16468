"""The build: what is forced is built or fails, what is not is left out with a notice; an sdist holds what it needs."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="no checkout around the tests")
pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy without build products."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    copy.mkdir()
    products = shutil.ignore_patterns("*.so", "__pycache__", "*.bin")
    for name in ("csrc", "kernels", "cts_fast"):
        shutil.copytree(CHECKOUT / name, copy / name, symlinks=True, ignore=products)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, copy)
    return copy


def setup_py(checkout: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """`python setup.py …` in the copy, where no compiler is found unless the environment says otherwise."""
    environment = {**os.environ, "CXX": "/no/compiler", "NVCC": "/no/nvcc", **environment}
    command = [sys.executable, "setup.py", *map(str, arguments)]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_an_unknown_mode_is_refused(checkout):
    result = setup_py(checkout, "build", CTS_FAST_BUILD="gpu")
    assert result.returncode and "CTS_FAST_BUILD='gpu'; known: auto, cuda, cpu, none" in result.stderr


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_forced_module_that_cannot_be_built_is_an_error(checkout, tmp_path, mode):
    result = setup_py(checkout, "build", "--build-base", tmp_path, CTS_FAST_BUILD=mode)
    assert result.returncode and "no C++ compiler was found" in result.stderr


def test_without_compilers_the_package_is_pure_python_and_says_so(checkout, tmp_path):
    folders = ("--build-base", tmp_path, "--build-lib", tmp_path / "lib")
    result = setup_py(checkout, "build", *folders, CTS_FAST_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert 'building extension "cts_fast._cpu" failed: no C++ compiler was found' in result.stderr + result.stdout
    assert not list(tmp_path.rglob("*.so"))
    program = (
        "import runpy, torch, cts_fast; runpy.run_module('cts_fast.info', run_name='__main__');"
        "print(cts_fast.__file__, cts_fast.ShiftingMetaOptimizer([[torch.nn.Parameter(torch.ones(2))]]).backend)"
    )
    info = output(sys.executable, "-c", program, cwd=tmp_path / "lib")
    off = next(line for line in info.splitlines() if line.split()[:1] == ["cpu"])
    assert "off: the native module is not there" in off and "CTS_FAST_BUILD=cpu" in off
    assert info.split()[-2:] == [str(tmp_path / "lib" / "cts_fast" / "__init__.py"), "torch"]


def test_none_builds_nothing(checkout, tmp_path):
    result = setup_py(checkout, "build", "--build-base", tmp_path, CTS_FAST_BUILD="none")
    assert result.returncode == 0 and "build_ext" not in result.stdout


def test_an_sdist_holds_every_source_and_the_kernels(checkout, tmp_path):
    result = setup_py(checkout, "sdist", "--dist-dir", tmp_path, CTS_FAST_BUILD="none")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    paths = [path for folder in ("csrc", "kernels") for path in (CHECKOUT / folder).glob("*.*")]
    needed = {str(path.relative_to(CHECKOUT)) for path in paths if path.is_file()}
    assert needed | {"setup.py", "pyproject.toml"} <= packed


def test_an_installed_module_exports_no_symbol_but_its_entry():
    module = pytest.importorskip("cts_fast._cpu")
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = output("nm", "-D", "--defined-only", module.__file__)
    assert "PyInit__cpu" in symbols and " cts" not in symbols and "_ZN3cts" not in symbols
    needed = subprocess.run(["ldd", module.__file__], capture_output=True, text=True).stdout
    assert "torch" not in needed and "gomp" not in needed


@pytest.mark.slow
def test_an_isolated_install_from_an_sdist_runs_the_native_step(checkout, tmp_path):
    assert setup_py(checkout, "sdist", "--dist-dir", tmp_path, CTS_FAST_BUILD="none").returncode == 0
    archive, target = next(tmp_path.glob("*.tar.gz")), tmp_path / "installed"
    environment = {**os.environ, "CTS_FAST_BUILD": "cpu"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(archive)]
    subprocess.run(command, env=environment, check=True)
    imported = "cts_fast._cpu, cts_fast.kernels, cts_fast.engine.backends.cpu"
    program = f"import {imported}; print(cts_fast._cpu.__file__, cts_fast.kernels.__file__)"
    found = output(sys.executable, "-c", program, cwd=target).split()
    assert all(path.startswith(str(target)) for path in found)
