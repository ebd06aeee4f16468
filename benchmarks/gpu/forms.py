"""Forms of the kernels for more than 8 tasks, to be compared on a GPU: python -m benchmarks.gpu.forms FOLDER builds one
module each there, for the Python that runs it.

Then, where the GPU is, `FORMS=FOLDER bash benchmarks/gpu_check.sh --only bandwidth forms` checks and times them.
"""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = [("resnet20", tasks) for tasks in (16, 32, 64, 128)] + [("resnet18", tasks) for tasks in (16, 32)]


class Edit(NamedTuple):
    """What a form changes in a file of csrc/cuda: a text that stands there once."""

    file: str
    old: str
    new: str


def threads(number: int, least_lanes: int = 32) -> Edit:
    """Blocks of another number of threads, where tasks are split over slices."""
    lanes = f"std::max((slices > 1 ? {number} : THREADS) / slices / {least_lanes} * {least_lanes}, {least_lanes})"
    return Edit("launch.h", "std::max(THREADS / slices / 32 * 32, 32)", lanes)


FORMS = {
    "as it is": (),
    "slices of any number": (Edit("shifting_step.cu", "else if (tasks % HELD == 0 &&", "else if (false &&"),),
    "2 tasks in flight": (Edit("tiles.h", "(sizeof(P) == 4 ? 4 : 2)", "2"),),
    "64 threads": (threads(64),),
    "256 threads": (threads(256),),
    "16 lanes": (threads(128, least_lanes=16),),
    "slices of 4": (
        Edit("launch.h", "HELD = 8, MAX_SLICES", "HELD = 4, MAX_SLICES"),
        Edit("launch.h", "most = std::min(", "most = tasks <= 8 ? 1 : std::min("),
    ),
}


def edited(form: str) -> dict[str, str]:
    """File of csrc/cuda → its text in a form; ValueError where the sources have no such place."""
    texts: dict[str, str] = {}
    for file, old, new in FORMS[form]:
        text = texts.get(file) or (ROOT / "csrc" / "cuda" / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{form}: {old!r} stands {text.count(old)} times in csrc/cuda/{file}")
        texts[file] = text.replace(old, new)
    return texts


def file_of(form: str, folder: Path) -> Path:
    """Where a form's module lies."""
    return folder / f"{form.replace(' ', '-')}.so.gz"


def build(folder: Path) -> None:
    """A module of each form, in a file of its name; what no form changes is compiled once."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CTS_FAST_BUILD": "cuda"}
    environment.setdefault("CTS_FAST_CUDA_ARCHITECTURES", "90")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shutil.copytree(ROOT / "csrc", work / "csrc")
        shutil.copytree(
            ROOT / "cts_fast", work / "cts_fast", ignore=shutil.ignore_patterns("*.so*", "builtin", "kernels")
        )
        shutil.copytree(ROOT / "kernels", work / "cts_fast" / "kernels")
        for file in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(ROOT / file, work)
        for form in FORMS:
            for file, text in edited(form).items():
                (work / "csrc" / "cuda" / file).write_text(text)
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(work / "built")]
            subprocess.run(command, cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
            (module,) = (work / "built" / "cts_fast").glob("_cuda*.so")
            file_of(form, folder).write_bytes(gzip.compress(module.read_bytes()))  # the way to a GPU may be narrow
            for file in edited(form):
                shutil.copy(ROOT / "csrc" / "cuda" / file, work / "csrc" / "cuda")
            print(f"built: {form}", flush=True)


def use(module: Path) -> None:
    """Let a module stand in the place of cts_fast._cuda in this process."""
    if "cts_fast._cuda" in sys.modules:
        raise RuntimeError("cts_fast._cuda is loaded already")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(gzip.decompress(module.read_bytes()))
        file.flush()
        loader = importlib.machinery.ExtensionFileLoader("cts_fast._cuda", file.name)
        spec = importlib.util.spec_from_loader("cts_fast._cuda", loader)
        sys.modules["cts_fast._cuda"] = used = importlib.util.module_from_spec(spec)
        loader.exec_module(used)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
