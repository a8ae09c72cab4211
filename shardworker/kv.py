"""Keys and values of a session: memory in pages. Knows no sequence and no request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from protos.errors import InvalidArgument, OutOfMemory
from protos.tensors import TORCH_DTYPES
from shardworker.memory import device_memory
from shardworker.plan import length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import ShardPlan


MAX_TOKENS = 2**31 - 1
"""Of a session: kernels number pages and tokens in 32 bits."""


class KvPool:
    """[layers, 2, kv_heads, pages, page_tokens, head_dim] in the plan's dtype; the system commits pages as they are written."""

    def __init__(self, plan: ShardPlan, num_pages: int, device: torch.device, uncommitted_bytes: int) -> None:
        """Reserve memory.

        Args:
            plan: says layers, heads and page size.
            num_pages: numbered from 0.
            device: where the keys and values live.
            uncommitted_bytes: what other pools reserved and have not touched yet, which still looks free.

        Raises:
            InvalidArgument: more pages than can be numbered.
            OutOfMemory: names the bytes wanted and free.

        """
        if num_pages * plan.page_tokens > MAX_TOKENS:
            raise InvalidArgument(
                f"num_pages: {num_pages} pages of {plan.page_tokens} tokens are more than the {MAX_TOKENS} tokens of a session"
            )
        kv_heads, dim = length(plan.kv_heads), plan.attention.head_dim
        shape = (len(plan.layers), 2, kv_heads, num_pages * plan.page_tokens, dim)
        self.num_bytes = math.prod(shape) * TORCH_DTYPES[plan.dtype].itemsize
        self._page_bytes = self.num_bytes // num_pages
        self._touched: set[int] = set()
        self._device = device
        free = device_memory(device).free - uncommitted_bytes
        if self.num_bytes > free:
            raise OutOfMemory(
                f"{num_pages} pages of KV need {self.num_bytes} bytes, {max(0, free)} are free on this worker ({device.type}): "
                "ask for fewer pages or use more workers"
            )
        try:
            pool = torch.empty(shape, dtype=TORCH_DTYPES[plan.dtype], device=device)
        except RuntimeError as error:  # torch's allocators raise this, or a subclass
            raise OutOfMemory(f"{num_pages} pages of KV need {self.num_bytes} bytes, which cannot be had: {error}") from error
        self._layers = [(layer[0], layer[1]) for layer in pool]

    @property
    def uncommitted_bytes(self) -> int:
        """Reserved but never written to."""
        return self.num_bytes - len(self._touched) * self._page_bytes if self._device.type == "cpu" else 0

    def touch(self, pages: Sequence[int]) -> None:
        """Say that pages are about to be written to."""
        self._touched.update(pages)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all pages, [kv_heads, pages * page_tokens, head_dim]."""
        return self._layers[layer]
