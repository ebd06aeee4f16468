"""Compiles the Triton kernel without a GPU and prints what came out as JSON.

python triton_compile.py '[{"capability": 90, "T": 8}, …]'
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cts_fast.engine.backends.triton import tile_shape
from cts_fast.kernels import shifting_step as step

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


WORK = {"fp32": "float32", "fp64": "float64"}


def source(T, dtype="fp32", aligned=True, dampened=False, counting=False, nonfinite=False, kernel="shifting_step"):
    """The kernel as the launcher would specialize it. kernel: the whole step, or a half of it."""
    function = getattr(step, f"{kernel}_kernel")
    work = "fp64" if dtype == "fp64" else "fp32"
    pointers = dict(tiles="i64", gradients="i64", groups="i32", hyper="fp64", theta=dtype, v=dtype, phi=work)
    pointers |= dict(head_theta=dtype, head_v=dtype)
    numbers = dict.fromkeys(("stride", "shared_tiles", "shared_count", "count", "mode"), "i32")
    if dtype in ("bf16", "fp16"):
        pointers |= dict(master="fp32", head_master="fp32")
    if dampened or counting:
        pointers |= dict(started="u8")
    if nonfinite:
        pointers |= dict(nonfinite="u8")
    if counting:
        pointers |= dict(counters="i64", ticket="i32", found_inf="fp32", grad_scale="fp32")
        numbers |= dict(horizon="i64", meta_interval="i32", counts="i32")
    plain = T <= 8 and not (dampened or counting or nonfinite)
    given = dict(T=T, PLAIN=plain, ALIGNED=aligned, WORK=getattr(tl, WORK[work]), DAMPENED=dampened)
    given |= tile_shape(T, DTYPES[work])
    if kernel != "shifting_step":
        pointers |= dict(total=work)
    names = function.arg_names
    types = {name: "*" + kind for name, kind in pointers.items()} | numbers
    types = {name: kind for name, kind in types.items() if name in names}
    constants = {name: given.get(name) for name in names if name not in types}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "").startswith("*") or name == "stride"
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    return ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)


def facts(capability, **variant):
    """What came of one variant.

    Kernel entries, barriers that the source asks for, global accesses by width in bytes, registers and local memory.
    """
    options = dict(num_warps=4, enable_fp_fusion=False)
    kernel = triton.compile(source(**variant), target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    widths = {"load": [], "store": []}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.(v[24]))?\.[bfsu](\d+)", ptx):
        widths["load" if kind == "ld" else "store"].append(int(bits) // 8 * int(vector[1:] or 1))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    barriers = len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", kernel.asm["ttgir"]))
    entries, usage = ptx.count(".entry"), dict(registers=registers, stack=stack, local=local)
    return dict(barriers=barriers, entries=entries, widths=widths, threads=128, **usage)


if __name__ == "__main__":
    print(json.dumps([facts(**variant) for variant in json.loads(sys.argv[1])]))
