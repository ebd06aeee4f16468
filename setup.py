"""Builds the native modules `cts_fast._cpu` and `cts_fast._cuda` with ninja; neither needs torch to build or to link.

The environment variable CTS_FAST_BUILD chooses: "auto" builds what this machine has compilers for and goes on without the rest,
"cpu" and "cuda" (which holds "cpu") fail if they cannot be built, "none" builds nothing. CTS_FAST_CUDA_ARCHITECTURES="90" or "80 90" builds
for those alone. CXX, CXXFLAGS, LDFLAGS, NVCC and MAX_JOBS are heeded.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path("csrc")
HEADERS = sorted(str(path) for path in CSRC.rglob("*.h"))
MODES = ("auto", "cuda", "cpu", "none")
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra".split()
LINK_FLAGS = ["-shared", "-s", "-pthread", "-ldl"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"plain": []}  # instruction set → flags; one object of the kernel for each, chosen at run time
if X86:
    ISAS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"],
    }
VARIANTS = {  # sources that are compiled several times, in parallel: name → flags
    **dict.fromkeys(
        ("shifting_step.cpp", "passes.cpp"), {isa: [*flags, f"-DCTS_ISA={isa}"] for isa, flags in ISAS.items()}
    ),
    "shifting_step.cu": {dtype: [f"-DCTS_DTYPE={dtype}"] for dtype in ("float32", "float64", "bfloat16", "float16")},
}
CUDA_ARCHITECTURES = (80, 90, 100, 120)
JOB_BYTES = 1536 << 20  # memory that one compiler may need


def mode() -> str:
    """What CTS_FAST_BUILD asks for."""
    chosen = os.environ.get("CTS_FAST_BUILD", "auto")
    if chosen not in MODES:
        raise PlatformError(f"CTS_FAST_BUILD={chosen!r}; known: {', '.join(MODES)}")
    return chosen


def nvcc() -> str | None:
    """The CUDA compiler's path, if there is one."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


def jobs() -> int:
    """Compilers at a time: as many as there are cores, and memory for."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, free // JOB_BYTES))


def gencode(compiler: str) -> list[str]:
    """Flags for the architectures that this nvcc knows (or the user names), and PTX of the newest for those to come."""
    try:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{compiler} does not run: {error}") from error
    wanted = os.environ.get("CTS_FAST_CUDA_ARCHITECTURES", "").split()
    chosen = [arch for arch in wanted or map(str, CUDA_ARCHITECTURES) if f"compute_{arch}" in known]
    if not chosen or set(wanted) - set(chosen):
        raise CompileError(
            f"{compiler} does not know all of the architectures {wanted or CUDA_ARCHITECTURES}; it knows {' '.join(known)}"
        )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


class Ninja(build_ext):
    """Each native module as one ninja build: all objects in parallel, then the link."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one module; raises CompileError with what is missing or what the compiler said."""
        folder = (Path(self.build_temp) / ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        rules = self.cuda_rules() if ext.name.endswith("_cuda") else self.cpu_rules()
        (folder / "build.ninja").write_text("\n".join(self.statements(rules, ext, target)) + "\n")
        result = subprocess.run([self.ninja(), "-C", str(folder), f"-j{jobs()}"], capture_output=True, text=True)
        print(result.stdout)
        if result.returncode:
            raise CompileError(f"{ext.name} could not be built:\n{result.stdout}{result.stderr}")
        if Path(".git").exists():  # `python -m` from inside a checkout imports the checkout, which should be as fast
            beside = Path("cts_fast", target.name).resolve()
            if beside != target:
                shutil.copy2(target, beside)

    def ninja(self) -> str:
        """Ninja's path: the build requirement's, or the system's."""
        try:
            import ninja

            return str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            found = shutil.which("ninja")
        if found is None:
            raise CompileError("ninja was not found; pip install ninja")
        return found

    def includes(self) -> list[str]:
        """-I flags for Python and pybind11."""
        import pybind11

        folders = dict.fromkeys([str(CSRC.resolve()), *self.include_dirs, pybind11.get_include()])
        return [f"-I{folder}" for folder in folders]

    def cpu_rules(self) -> dict[str, list[str]]:
        """Command lines: "cxx" compiles a file, "link" makes the module."""
        compiler = shlex.split(os.environ.get("CXX", "")) or [
            next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
        ]
        if not shutil.which(compiler[0]):
            raise CompileError("no C++ compiler was found; install g++ or clang++, or set CXX")
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *(["-DCTS_X86"] if X86 else [])]
        return {
            "cxx": [*compiler, *flags, *self.includes(), "-MMD", "-MF", "$out.d", "$flags", "-c", "$in", "-o", "$out"],
            "link": [*compiler, "$in", "-o", "$out", *LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))],
        }

    def cuda_rules(self) -> dict[str, list[str]]:
        """As `cpu_rules`, with nvcc, which knows its own headers and libraries."""
        compiler = nvcc()
        if compiler is None:
            raise CompileError("nvcc was not found; install the CUDA toolkit, or set NVCC")
        flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(compiler), "-t1"]
        return {
            "cxx": [compiler, *flags, *self.includes(), "-MMD", "-MF", "$out.d", "$flags", "-c", "$in", "-o", "$out"],
            "link": [
                compiler,
                "-shared",
                "-cudart=static",
                "$in",
                "-o",
                "$out",
                "-Xlinker=-s",
                "-Xlinker=--exclude-libs,ALL",
            ],
        }

    def statements(self, rules: dict[str, list[str]], ext: Extension, target: Path) -> list[str]:
        """The text of build.ninja."""
        lines = [f"rule cxx\n  command = {' '.join(rules['cxx'])}\n  depfile = $out.d\n  deps = gcc",
                 f"rule link\n  command = {' '.join(rules['link'])}"]  # fmt: skip
        objects = []
        for source in map(Path, ext.sources):
            for name, flags in VARIANTS.get(source.name, {"": []}).items():
                objects.append(f"{source.name}{'.' if name else ''}{name}.o")
                lines.append(f"build {objects[-1]}: cxx {escaped(source.resolve())}")
                lines.append("  flags = " + " ".join(flags))
        lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
        return lines


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The native modules to build; in auto mode one that cannot be built is left out, with a notice."""
    chosen, optional = mode(), mode() == "auto"
    modules = []
    if chosen != "none":
        names = ("cpu/shifting_step", "cpu/plan", "cpu/passes", "python/gradients", "python/cpu_bindings")
        sources = [str(CSRC / f"{name}.cpp") for name in names]
        modules.append(Extension("cts_fast._cpu", sources, depends=HEADERS, optional=optional))
    if chosen == "cuda" or (chosen == "auto" and nvcc()):
        sources = [
            str(CSRC / name) for name in ("cuda/shifting_step.cu", "cuda/launch.cpp", "python/cuda_bindings.cpp")
        ]
        modules.append(Extension("cts_fast._cuda", sources, depends=HEADERS, optional=optional))
    return [module for module in modules if not optional or all(map(os.path.exists, module.sources))]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Ninja})
