"""What attention's kernels are told about a step: one array of integers, copied to the GPU once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardworker.kernels.cuda.staging import staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from shardworker.kernels.interface import HeadSpec, Span

PROMPT_ROWS = 64
"""Rows of a prompt that attend in one program."""

FIELDS = 4
"""Integers that describe a decoding row or a tile of a prompt; pieces of the array begin at multiples of it, 16 bytes."""


class Tables(NamedTuple):
    """int32, views of one array."""

    slots: torch.Tensor
    """[rows]; -1: no row."""
    pages: torch.Tensor
    """[sequences, pages]."""
    decoding: torch.Tensor
    """[decoding rows, 4]: row of the step, sequence, tokens (0: no row), nothing."""
    tiles: torch.Tensor
    """[tiles, 4]: row of the step, number of rows, position of the first, sequence."""
    group_starts: torch.Tensor
    """[kv_heads + 1]: the first query head of each kv head."""
    kv_head_of: torch.Tensor
    """[heads]."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How much room the tables of a step take; steps with the same frame can use the same memory."""

    rows: int
    sequences: int
    pages: int
    decoding: int
    tiles: int
    kv_heads: int
    heads: int

    @classmethod
    def of(cls, spans: Sequence[Span], heads: HeadSpec) -> Frame:
        """The least room for these rows."""
        counts = [num_rows(span) for span in spans]
        return cls(
            rows=sum(counts),
            sequences=len(spans),
            pages=max(len(span.pages) for span in spans),
            decoding=counts.count(1),
            tiles=sum(-(-count // PROMPT_ROWS) for count in counts if count > 1),
            kv_heads=heads.num_kv_heads,
            heads=heads.num_heads,
        )

    def rounded(self, rows: int) -> Frame:
        """The room of a step that only decodes, `rows` of them, with pages up to a power of 2."""
        return Frame(rows, rows, 1 << (self.pages - 1).bit_length(), rows, 0, self.kv_heads, self.heads)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [
            (self.rows,),
            (self.sequences, self.pages),
            (self.decoding, FIELDS),
            (self.tiles, FIELDS),
            (self.kv_heads + 1,),
            (self.heads,),
        ]

    def _places(self) -> list[tuple[tuple[int, ...], int, int]]:
        """Shape, begin and end of each table."""
        places, begin = [], 0
        for shape in self._shapes:
            end = begin + int(np.prod(shape))
            places.append((shape, begin, end))
            begin = -(-end // FIELDS) * FIELDS
        return places

    def tables(self, array: torch.Tensor) -> Tables:
        """See the tables in an array from `fill`."""
        return Tables(*(array[begin:end].view(shape) for shape, begin, end in self._places()))

    def fill(self, spans: Sequence[Span], heads: HeadSpec, page_tokens: int, device: torch.device) -> torch.Tensor:
        """The array, on the CPU (pinned where the device is a GPU). What no row fills says so: -1 slots, 0 tokens."""
        places = self._places()
        array, memory = staged(places[-1][2], device)
        array.fill(0)
        slots, pages, decoding, tiles, group_starts, kv_head_of = (
            array[begin:end].reshape(shape) for shape, begin, end in places
        )
        slots.fill(-1)
        decoded = tiled = 0
        for sequence, span in enumerate(spans):
            count, position = num_rows(span), span.position
            own = pages[sequence]
            own[: len(span.pages)] = span.pages
            positions = np.arange(position, position + count)
            slots[span.rows] = own[positions // page_tokens] * page_tokens + positions % page_tokens
            if count == 1:
                decoding[decoded] = span.rows.start, sequence, position + 1, 0
                decoded += 1
                continue
            for first in range(0, count, PROMPT_ROWS):
                rows = min(PROMPT_ROWS, count - first)
                tiles[tiled] = span.rows.start + first, rows, position + first, sequence
                tiled += 1
        group_starts[1:] = np.cumsum(np.bincount(np.array(heads.kv_head_of, dtype=np.int32), minlength=heads.num_kv_heads))
        kv_head_of[:] = heads.kv_head_of
        return memory


def num_rows(span: Span) -> int:
    """Rows of a sequence in the step."""
    return int(span.rows.stop - span.rows.start)
