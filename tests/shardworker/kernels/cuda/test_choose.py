from __future__ import annotations

import sys

import pytest
import torch

from shardworker.kernels.choose import choose_kernels
from shardworker.kernels.cuda.kernels import CudaKernels
from shardworker.kernels.plain import PlainKernels

GPU = torch.device("cuda", 0)


def with_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_a_gpu_gets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    kernels = choose_kernels(GPU, 1)
    assert isinstance(kernels, CudaKernels)
    assert kernels.device == GPU


def test_an_old_gpu_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (7, 5))
    assert isinstance(choose_kernels(GPU, 1), PlainKernels)


def test_a_gpu_without_triton_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "shardworker.kernels.cuda.kernels", None)
    assert isinstance(choose_kernels(GPU, 1), PlainKernels)
