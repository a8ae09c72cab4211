"""Which kernels a device gets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import structlog
import torch

from protos.errors import InvalidArgument
from shardworker.kernels.plain import PlainKernels

if TYPE_CHECKING:
    from types import ModuleType

    from shardworker.kernels.interface import Kernels

log = structlog.get_logger(__name__)

LEAST_CAPABILITY = (8, 0)
"""Of a GPU for the Triton kernels: the first that multiplies bfloat16."""


def choose_kernels(device: torch.device, num_threads: int) -> Kernels:
    """Give the fastest that can be had, and log why where that is torch's operators.

    Args:
        device: that computes.
        num_threads: that compute, on the CPU.

    Raises:
        InvalidArgument: the system does not give that many threads.

    """
    if device.type == "cpu":
        try:
            compiled = importlib.import_module("shardworker.kernels.compiled")
        except ImportError as error:
            log.warning("no compiled kernels: install with a C compiler for speed", error=str(error))
        else:
            return _compiled_kernels(compiled, num_threads)
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        log.warning("no Triton kernels: the GPU is too old", capability=capability, wanted=LEAST_CAPABILITY)
    elif device.type == "cuda":
        try:
            triton = importlib.import_module("shardworker.kernels.cuda.kernels")
        except ImportError as error:
            log.warning("no Triton kernels: install with the extra `cuda` for speed", error=str(error))
        else:
            on_gpu: Kernels = triton.CudaKernels(device)
            return on_gpu
    return PlainKernels(device)


def _compiled_kernels(compiled: ModuleType, num_threads: int) -> Kernels:
    try:
        kernels: Kernels = compiled.CompiledKernels(num_threads)
    except OSError as error:
        raise InvalidArgument(f"{error}: ask for fewer with --threads, or raise the system's limit") from error
    return kernels
