from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")
SHARED_MEMORY = 99 << 10
"""Of the smallest GPU of compute capability 8 or more, for one program."""

KERNELS = {"linear", "gate_up", "down", "add_up", "place_heads", "attend_split", "join_splits", "attend_prompt"}


# What the interpreter allows is not yet what the compiler allows; compiling needs no GPU.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization", "capability"),
    [("bf16", "int4", "90"), ("bf16", "none", "80"), ("f16", "int8", "80"), ("f32", "int4", "90"), ("f32", "none", "89")],
)
def test_every_kernel_compiles_and_fits(dtype: str, quantization: str, capability: str) -> None:
    done = subprocess.run([sys.executable, PROGRAM, dtype, quantization, capability], capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    assert set(found) == KERNELS
    assert {name: entry["shared"] for name, entry in found.items() if entry["shared"] > SHARED_MEMORY} == {}
