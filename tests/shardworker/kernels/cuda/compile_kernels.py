"""Compiles what a worker would launch for Qwen3-30B-A3B, for GPUs that need not be there. A program: Triton must not interpret.

    python tests/shardworker/kernels/cuda/compile_kernels.py bf16 int4 90

Prints a JSON object: kernel -> its largest shared memory, registers spilled and variants, over decoding and prompts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[4]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE
from shardworker.kernels.cuda.kernels import CudaKernels
from shardworker.kernels.interface import HeadSpec, Span

CPU = torch.device("cpu")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
QUANTIZATIONS = {"none": QUANTIZATION_NONE, "int8": QUANTIZATION_INT8, "int4": QUANTIZATION_INT4}
HIDDEN, COLUMNS, EXPERTS, CHOSEN, DIM = 2048, 768, 4, 2, 128
HEADS, KV_HEADS, PAGE = 32, 4, 16


def compile_instead(found: dict[str, dict[str, int]], capability: int) -> Any:
    """Make a stand-in for `JITFunction.run` that compiles and launches nothing."""
    seen: set[Any] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
        fixed = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: kind(values[name]) if name not in fixed else "constexpr" for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if is_aligned(values[name], name in fixed)}
        key = json.dumps([kernel.__name__, signature, fixed, options], default=str)
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        entry = found.setdefault(kernel.__name__, {"shared": 0, "variants": 0, "ptx": 0})
        entry["shared"] = max(entry["shared"], compiled.metadata.shared)
        entry["variants"] += 1
        entry["ptx"] = max(entry["ptx"], len(compiled.asm["ptx"]))
        if folder := os.environ.get("PTX_FOLDER"):
            Path(folder, f"{kernel.__name__}-{entry['variants']}.ptx").write_text(compiled.asm["ptx"])
            Path(folder, f"{kernel.__name__}-{entry['variants']}.cubin").write_bytes(compiled.asm["cubin"])

    return run


def kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any, is_fixed: bool) -> bool:
    return isinstance(value, torch.Tensor) or (not is_fixed and isinstance(value, int) and value % 16 == 0)


def launch_everything(dtype: torch.dtype, quantization: Any) -> None:
    kernels = CudaKernels(CPU)
    qkv = kernels.empty_weight(((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), quantization, dtype, CPU)
    gate_up = kernels.empty_weight((EXPERTS, 2 * COLUMNS, HIDDEN), quantization, dtype, CPU)
    down = kernels.empty_weight((EXPERTS, HIDDEN, COLUMNS), quantization, dtype, CPU)
    norm = torch.zeros(HEADS + KV_HEADS, DIM, dtype=dtype)
    frequencies = torch.ones(DIM // 2)
    readers = tuple(head * KV_HEADS // HEADS for head in range(HEADS))
    heads = HeadSpec(HEADS, KV_HEADS, DIM, readers, 0.1, 1e-6, 0.0, DIM, frequencies, 1.0, None, dtype)
    pool = torch.zeros(2, KV_HEADS, 64 * PAGE, DIM, dtype=dtype)
    for rows in (1, 128):
        x = torch.zeros(rows, HIDDEN, dtype=dtype)
        qkv.matmul(x)
        chosen = torch.arange(CHOSEN).expand(rows, CHOSEN).contiguous()
        kernels.experts(x, chosen, torch.zeros(rows, CHOSEN), gate_up, down)
        step = kernels.begin(heads, [Span(slice(0, rows), 0, rows, tuple(range(-(-rows // PAGE))), contiguous=True)], PAGE)
        step(torch.zeros(rows, HEADS + 2 * KV_HEADS, DIM, dtype=dtype), norm, None, pool[0], pool[1])


def main(dtype: str, quantization: str, capability: str) -> None:
    found: dict[str, dict[str, int]] = {}
    triton.runtime.jit.JITFunction.run = compile_instead(found, int(capability))
    launch_everything(DTYPES[dtype], QUANTIZATIONS[quantization])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
