"""What the GPU check ran on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess


def describe(device: str) -> dict:
    """Versions, the backends that are off and why, and of a GPU its properties, flags, clocks and power."""
    import torch

    from cts_fast.engine.step import BACKENDS, unavailable

    off = {name: why for name in BACKENDS if (why := unavailable(name, torch.device(device), torch.float32))}
    facts = {
        "name": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "off": off,
    }
    return facts | (_gpu() if device == "cuda" else {})


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _gpu() -> dict:
    import torch

    gpu = torch.cuda.get_device_properties(0)
    cudnn, asked = torch.backends.cudnn, "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    said = None
    if tool := shutil.which("nvidia-smi"):
        query = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "name": gpu.name,
        "capability": [gpu.major, gpu.minor],
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "tf32_convolutions": cudnn.allow_tf32,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": cudnn.version(),
        "cudnn_benchmark": cudnn.benchmark,
        "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "driver, clocks, power": said,
    }
