"""The kernels under Triton's interpreter on the CPU, or compiled where there is a GPU; `tests/conftest.py` says which."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'shardmesh[cuda]'")

import triton.language as tl
from triton.runtime import interpreter

from shardworker.kernels.cuda.kernels import CudaKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def interpreter_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the interpreter in three points.

    It truncates float32 to bfloat16, where a GPU rounds to nearest; its `dot` multiplies the integers that it keeps bfloat16
    as; and numpy's matmul adds up in an order that depends on where a row stands, which the instruction of a GPU does not.
    """
    original = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return original(data, source, target, mode)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=np.float32)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="with a GPU the kernels are compiled for it")),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")],
        ),
    ]
)
def kernels(request: pytest.FixtureRequest) -> CudaKernels:
    """On the CPU under the interpreter, and, marked `gpu`, compiled."""
    return CudaKernels(torch.device(request.param))
