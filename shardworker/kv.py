"""Keys and values of a session, in pages: write by slot, read by page table. Knows no sequence and no request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.errors import OutOfMemory
from protos.tensors import TORCH_DTYPES
from shardworker.memory import device_memory
from shardworker.plan import length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import ShardPlan


@dataclass(frozen=True, slots=True)
class Pages:
    """Where a sequence's tokens lie: the first `num_tokens` slots of a run of pages, or of scattered ones."""

    num_tokens: int
    first_slot: int
    scattered: torch.Tensor | None
    """Page numbers; absent where the pages follow each other."""


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
            OutOfMemory: names the bytes wanted and free.

        """
        kv_heads, dim = length(plan.kv_heads), plan.attention.head_dim
        shape = (len(plan.layers), 2, kv_heads, num_pages * plan.page_tokens, dim)
        self.num_bytes = math.prod(shape) * TORCH_DTYPES[plan.dtype].itemsize
        self.page_tokens = plan.page_tokens
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

    def slots(self, table: Sequence[int], position: int, num_rows: int) -> list[int]:
        """Where the tokens from `position` on go, given a sequence's page table."""
        size = self.page_tokens
        return [table[i // size] * size + i % size for i in range(position, position + num_rows)]

    def pages(self, table: Sequence[int], num_tokens: int, *, contiguous: bool) -> Pages:
        """Describe the first `num_tokens` of a page table for `read`."""
        scattered = None if contiguous else torch.tensor(table, device=self._device)
        return Pages(num_tokens, table[0] * self.page_tokens, scattered)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put [rows, kv_heads, head_dim] at `slots`."""
        keys, values = self._layers[layer]
        keys.index_copy_(1, slots, k.transpose(0, 1))
        values.index_copy_(1, slots, v.transpose(0, 1))

    def read(self, layer: int, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [kv_heads, num_tokens, head_dim]: views where the pages follow each other, gathered otherwise."""
        keys, values = self._layers[layer]
        if pages.scattered is None:
            run = slice(pages.first_slot, pages.first_slot + pages.num_tokens)
            return keys[:, run], values[:, run]
        return self._gather(keys, pages, pages.scattered), self._gather(values, pages, pages.scattered)

    def _gather(self, pool: torch.Tensor, pages: Pages, scattered: torch.Tensor) -> torch.Tensor:
        paged = pool.unflatten(1, (-1, self.page_tokens))  # [kv_heads, pages, page_tokens, head_dim]
        gathered: torch.Tensor = paged.index_select(1, scattered).flatten(1, 2)
        return gathered[:, : pages.num_tokens]
