"""Compiles the Triton kernel without a GPU and prints what came out as JSON: python triton_compile.py '[{"capability": 90, "T": 8}, …]'."""

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

from cts_fast.kernels import shifting_step as step

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def source(T, dtype="fp32", aligned=True, dampened=False, counting=False, nonfinite=False):
    """The kernel as the launcher would specialize it."""
    work = "fp64" if dtype == "fp64" else "fp32"
    types = dict(
        tiles="*i64", gradients="*i64", groups="*i32", hyper="*fp64", theta="*" + dtype, v="*" + dtype, phi="*" + work, stride="i32",
        head_theta="*" + dtype, head_v="*" + dtype, shared_tiles="i32", shared_count="i32", count="i32", mode="i32",
    )  # fmt: skip
    if dtype in ("bf16", "fp16"):
        types |= dict(master="*fp32", head_master="*fp32")
    if dampened or counting:
        types |= dict(started="*u8")
    if nonfinite:
        types |= dict(nonfinite="*u8")
    if counting:
        types |= dict(
            counters="*i64",
            ticket="*i32",
            horizon="i64",
            meta_interval="i32",
            found_inf="*fp32",
            grad_scale="*fp32",
            counts="i32",
        )
    given = dict(
        T=T,
        PLAIN=T <= 8 and not (dampened or counting or nonfinite),
        ALIGNED=aligned,
        WORK=tl.float64 if work == "fp64" else tl.float32,
        DAMPENED=dampened,
    )
    given |= step.tile_shape(T, torch.float64 if work == "fp64" else torch.float32)
    names = step.shifting_step_kernel.arg_names
    constants = {name: given.get(name) for name in names if name not in types}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "").startswith("*") or name == "stride"
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    return ASTSource(step.shifting_step_kernel, signature=signature, constexprs=constants, attrs=attributes)


def facts(capability, **variant):
    """Kernel entries, barriers that the source asks for, global accesses by width in bytes, registers and local memory of one variant."""
    kernel = triton.compile(
        source(**variant), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=4, enable_fp_fusion=False)
    )
    ptx = kernel.asm["ptx"]
    widths = {"load": [], "store": []}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.(v[24]))?\.[bfsu](\d+)", ptx):
        widths["load" if kind == "ld" else "store"].append(int(bits) // 8 * int(vector[1:] or 1))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    barriers = len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", kernel.asm["ttgir"]))
    return dict(
        barriers=barriers,
        entries=ptx.count(".entry"),
        widths=widths,
        registers=registers,
        stack=stack,
        local=local,
        threads=128,
    )


if __name__ == "__main__":
    print(json.dumps([facts(**variant) for variant in json.loads(sys.argv[1])]))
