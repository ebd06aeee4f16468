"""Builds the native modules `cts_fast._cpu` and `cts_fast._cuda` with ninja; neither needs torch to build or to link.

The environment variable CTS_FAST_BUILD chooses: "auto" builds what this machine has compilers for and goes on without
the rest, "cpu" and "cuda" (which holds "cpu") fail if they cannot be built, "none" builds nothing.
CTS_FAST_CUDA_ARCHITECTURES="90" or "80 90" builds for those alone. CXX, CXXFLAGS, LDFLAGS, NVCC and MAX_JOBS count too.
"""

import hashlib
import json
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
MODES = ("auto", "cuda", "cpu", "none")
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra".split()
LINK_FLAGS = ["-shared", "-s", "-pthread", "-ldl"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_LINK_FLAGS = ["-Xlinker=-s", "-Xlinker=--exclude-libs,ALL"]
COMPILE = "-MMD -MF $out.d $flags -c $in -o $out".split()  # in ninja's words, the end of each compiler's command line
X86 = platform.machine().lower() in ("x86_64", "amd64")
SOURCES = {  # module → its files by role
    "_cpu": {
        "kernels": ["cpu/shifting_step.cpp", "cpu/method_ops.cpp"],
        "host": ["cpu/stepper.cpp"],
        "bindings": ["python/gradients.cpp", "python/cpu_bindings.cpp"],
    },
    "_cuda": {
        "kernels": ["cuda/shifting_step.cu"],
        "host": ["cuda/launch.cpp"],
        "bindings": ["python/cuda_bindings.cpp"],
    },
}
HEADERS = {
    "_cpu": ("*.h", "rules/*.h", "python/*.h", "cpu/*.h"),
    "_cuda": ("*.h", "rules/*.h", "python/*.h", "cuda/*.h"),
}
ISAS = {"plain": []}  # instruction set → flags; which one runs is chosen at run time
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", *ISAS["avx2"], "-Wno-maybe-uninitialized"]
VARIANTS = {  # module → what each of its kernels is compiled for, in parallel: name → flags
    "_cpu": {isa: [*flags, f"-DCTS_ISA={isa}"] for isa, flags in ISAS.items()},
    "_cuda": {dtype: [f"-DCTS_DTYPE={dtype}"] for dtype in ("float32", "float64", "bfloat16", "float16")},
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
        missing = f"does not know all of the architectures {wanted or CUDA_ARCHITECTURES}"
        raise CompileError(f"{compiler} {missing}; it knows {' '.join(known)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def sources(module: str) -> list[str]:
    """The files that are compiled into a module."""
    return [str(CSRC / name) for names in SOURCES[module].values() for name in names]


def headers(module: str) -> list[str]:
    """The files that these include."""
    return sorted(str(path) for pattern in HEADERS[module] for path in CSRC.glob(pattern))


def build_stamp(module: str) -> str:
    """16 hex digits that tell the sources and headers of a module from any other state of them."""
    digest = hashlib.sha256()
    for path in map(Path, sorted([*sources(module), *headers(module)])):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def description(module_file: Path) -> Path:
    """Where it stands what a module's file has to be; cts_fast/engine/native.py reads it."""
    return module_file.with_name(module_file.name + ".json")


def describe(module_file: Path, module: str) -> None:
    """Write a module's description."""
    content = module_file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    facts = {"bytes": len(content), "sha256": sha256, "build": build_stamp(module)}
    description(module_file).write_text(json.dumps(facts) + "\n")


def put_beside(built: Path, to: Path) -> None:
    """Copy a module and its description to where they are imported from.

    A program that runs the old module keeps it, and none finds the description of another one.
    """
    if built == to or not built.exists():
        return
    description(to).unlink(missing_ok=True)
    for source, target in ((built, to), (description(built), description(to))):
        temporary = target.with_name(target.name + ".new")
        shutil.copy2(source, temporary)
        os.replace(temporary, target)


class Ninja(build_ext):
    """Each native module as one ninja build: all objects in parallel, then the link."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one module; raises CompileError with what is missing or what the compiler said."""
        folder = (Path(self.build_temp) / ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        module = ext.name.rpartition(".")[2]
        rules = self.cuda_rules() if module == "_cuda" else self.cpu_rules()
        (folder / "build.ninja").write_text("\n".join(self.statements(rules, module, target)) + "\n")
        result = subprocess.run([self.ninja(), "-C", str(folder), f"-j{jobs()}"], capture_output=True, text=True)
        print(result.stdout)
        if result.returncode:
            raise CompileError(f"{ext.name} could not be built:\n{result.stdout}{result.stderr}")
        describe(target, module)
        if Path(".git").exists():  # `python -m` from inside a checkout imports the checkout, which should be as fast
            put_beside(target, Path("cts_fast", target.name).resolve())

    def copy_extensions_to_source(self) -> None:
        """As setuptools does it for builds in place, with each module's description."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()
            put_beside(built, Path("cts_fast", built.name).resolve())

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
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
        compiler = shlex.split(os.environ.get("CXX", "")) or [found]
        if not shutil.which(compiler[0]):
            raise CompileError("no C++ compiler was found; install g++ or clang++, or set CXX")
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *(["-DCTS_X86"] if X86 else [])]
        link_flags = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
        return {
            "cxx": [*compiler, *flags, *self.includes(), *COMPILE],
            "link": [*compiler, "$in", "-o", "$out", *link_flags],
        }

    def cuda_rules(self) -> dict[str, list[str]]:
        """As `cpu_rules`, with nvcc, which knows its own headers and libraries."""
        compiler = nvcc()
        if compiler is None:
            raise CompileError("nvcc was not found; install the CUDA toolkit, or set NVCC")
        flags = [*NVCC_FLAGS, *gencode(compiler), "-t1"]
        return {
            "cxx": [compiler, *flags, *self.includes(), *COMPILE],
            "link": [compiler, "-shared", "-cudart=static", "$in", "-o", "$out", *NVCC_LINK_FLAGS],
        }

    def statements(self, rules: dict[str, list[str]], module: str, target: Path) -> list[str]:
        """The text of build.ninja."""
        stamp = [f"-DCTS_BUILD={build_stamp(module)}", f"-DCTS_VERSION={self.distribution.get_version()}"]
        variants = {"kernels": VARIANTS[module], "host": {"": []}, "bindings": {"": stamp}}
        lines = ["rule cxx", f"  command = {' '.join(rules['cxx'])}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {' '.join(rules['link'])}"]
        objects = []
        for role, names in SOURCES[module].items():
            for source in (CSRC / name for name in names):
                for variant, flags in variants[role].items():
                    objects.append(f"{source.name}{'.' if variant else ''}{variant}.o")
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
    names = {"none": [], "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"], "auto": ["_cpu", "_cuda"] if nvcc() else ["_cpu"]}
    modules = [
        Extension(f"cts_fast.{name}", sources(name), depends=headers(name), optional=optional) for name in names[chosen]
    ]
    return [module for module in modules if not optional or all(map(os.path.exists, module.sources))]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Ninja})
