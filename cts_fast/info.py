"""`python -m cts_fast.info`: versions, the machine, and each backend: on, or off and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform

import torch

from cts_fast import __version__
from cts_fast.engine.arguments import DTYPES
from cts_fast.engine.native import load
from cts_fast.engine.step import BACKENDS, PREFERENCE, resolve, unavailable


def main() -> None:
    """Print one line a fact."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}"
    print(f"cts_fast {__version__}, {versions}")
    print(f"machine: {platform.machine()}, {platform.system()} {platform.release()}")
    print(f"CPU kernel: {_cpu_kernel()}")
    print(f"CUDA: {_cuda()}")
    print("backends:")
    for name in BACKENDS:
        print(f"  {name:10} {_state(name)}")
    for kind in PREFERENCE:
        print(f'"auto" on {kind}: {_auto(torch.device(kind))}')


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_kernel() -> str:
    try:
        from cts_fast.engine.backends import cpu
    except ImportError as error:
        return str(error)
    others = ", ".join(load("_cpu").instruction_sets())
    return f"{cpu.instruction_set()} (this machine has {others}), {torch.get_num_threads()} threads, {cpu.TEAM}"


def _cuda() -> str:
    """Toolkit of this torch, the driver's own version, and the devices."""
    built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        driver = f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    except OSError:
        driver = "no driver"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([built, driver, *(devices or ["no device"])])


def _state(name: str) -> str:
    """Where and for which dtypes a backend runs, or why it does not."""
    where, why = [], {}
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in DTYPES:
            reason = unavailable(name, torch.device(kind), dtype)
            if reason is None:
                where.append(f"{kind} {str(dtype).removeprefix('torch.')}")
            else:
                why.setdefault(reason, f"{kind}")
    return f"on: {', '.join(where)}" if where else "off: " + "; ".join(why)


def _auto(device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no device"
    return resolve("auto", device, torch.float32)


if __name__ == "__main__":
    main()
