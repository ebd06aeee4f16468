"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import cts_fast
from benchmarks.cpu import ceiling


def describe() -> dict[str, object]:
    """Processor, caches, memory, threads and versions."""
    cpu = _cpuinfo()
    return {
        "processor": cpu.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": "avx512_bf16" in cpu.get("flags", "").split(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cts_fast": cts_fast.__version__,
        "compiler": _compiler_version(),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache; 64 MiB where the system does not tell."""
    sizes = [_read(str(path)) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size and size[-1] in "KM"]
    return max(known, default=64 << 20)


def available_bytes() -> int:
    """Memory that can be had now without swapping."""
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 8 << 30


def name() -> str:
    """A short name of the machine for file names, such as "amd-epyc-avx2-2-threads"."""
    machine = describe()
    words = str(machine["processor"]).lower().replace("(r)", "").replace("(tm)", "").split()
    keep = [word for word in words if word.isalnum() or "-" in word][:3]
    vectors = str(machine["vectors"]).lower().split()
    return "-".join([*keep, *vectors, f"{torch.get_num_threads()}-threads"])


def _cpuinfo() -> dict[str, str]:
    lines = (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _compiler_version() -> str | None:
    found = ceiling.compiler()
    return found and subprocess.run([found, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
