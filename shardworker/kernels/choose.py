"""Which kernels a device gets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import structlog

from shardworker.kernels.plain import PlainKernels

if TYPE_CHECKING:
    import torch

    from shardworker.kernels.interface import Kernels

log = structlog.get_logger(__name__)


def choose_kernels(device: torch.device, num_threads: int) -> Kernels:
    """Give the fastest that can be had, and log why where that is torch's operators.

    Args:
        device: that computes.
        num_threads: that compute, on the CPU.

    """
    if device.type == "cpu":
        try:
            compiled = importlib.import_module("shardworker.kernels.compiled")
        except ImportError as error:
            log.warning("no compiled kernels: install with a C compiler for speed", error=str(error))
        else:
            kernels: Kernels = compiled.CompiledKernels(num_threads)
            return kernels
    return PlainKernels(device)
