"""The kernels under Triton's interpreter on the CPU, or compiled where there is a GPU; `tests/conftest.py` says which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'shardmesh[cuda]'")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from shardworker.kernels.cuda.kernels import CudaKernels  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret


@pytest.fixture(autouse=True)
def products_like_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the interpreter's `dot` in two points.

    It keeps bfloat16 as integers and multiplies those; and numpy's matmul adds up in an order that depends on where a row
    stands, which the instruction of a GPU does not.
    """

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=np.float32)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

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
