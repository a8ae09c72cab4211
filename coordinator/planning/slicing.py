"""Who gets which heads, columns and rows: half-open ranges and nothing else.

The rules: attention is cut by query heads, kv heads follow and are replicated where a cut goes through their group; columns of
feed-forward blocks are cut at multiples of the quantization group; vocabulary rows anywhere. Every count of shards works up to
`most_shards`, and where sizes do not divide, they differ by one unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from coordinator.models.spec import DenseSpec, MoeSpec
from protos.errors import TopologyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.models.spec import ModelSpec

GROUP = 32
"""Columns that share a quantization scale; `protos.tensors.BLOCK`, which cannot be imported without torch."""

Span = tuple[int, int]
"""Half-open: start <= i < end."""


@dataclass(frozen=True, slots=True)
class HeadCut:
    """One shard's part of attention."""

    heads: Span
    kv_heads: Span
    """Those that its heads read; may overlap with another shard's."""


def cut(size: int, num_shards: int) -> tuple[Span, ...]:
    """Cut [0, size) into contiguous parts whose sizes differ by at most one."""
    borders = [size * shard // num_shards for shard in range(num_shards + 1)]
    return tuple(pairwise(borders))


def cut_columns(width: int, num_shards: int, what: str) -> tuple[Span, ...]:
    """Cut a feed-forward block's columns at multiples of 32; only the last part may end elsewhere.

    Args:
        width: columns.
        num_shards: parts, none of them empty.
        what: what messages call the block.

    Raises:
        TopologyError: fewer groups than shards.

    """
    groups = -(-width // GROUP)
    _check(num_shards, groups, f"{what} of {width} columns, in groups of {GROUP}")
    return tuple((start * GROUP, min(end * GROUP, width)) for start, end in cut(groups, num_shards))


def cut_vocabulary(vocabulary: int, num_shards: int) -> tuple[Span, ...]:
    """Cut the rows of the output head.

    Raises:
        TopologyError: fewer rows than shards.

    """
    _check(num_shards, vocabulary, f"a vocabulary of {vocabulary} rows")
    return cut(vocabulary, num_shards)


def cut_heads(num_heads: int, num_kv_heads: int, num_shards: int) -> tuple[HeadCut, ...]:
    """Cut attention by query heads.

    Of two ways the one with the fewest kv heads on the fullest shard is taken, then the one with the fewest query heads there:
    an even cut of the query heads, or one at the borders of kv groups as far as there are enough of those.

    Raises:
        TopologyError: fewer heads than shards.

    """
    _check(num_shards, num_heads, f"attention with {num_heads} heads")
    group = num_heads // num_kv_heads
    ways = [
        _with_kv_heads(heads, group) for heads in (cut(num_heads, num_shards), _cut_at_groups(group, num_kv_heads, num_shards))
    ]
    return min(ways, key=lambda way: (max(_size(part.kv_heads) for part in way), max(_size(part.heads) for part in way)))


def most_shards(spec: ModelSpec) -> int:
    """Most shards that a model can be cut into."""
    widths = [-(-width // GROUP) for _, width in column_widths(spec)]
    return min(spec.attention.num_heads, spec.vocabulary, *widths)


def column_widths(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """List the different kinds of feed-forward columns that a model has: what, width."""
    for block in dict.fromkeys(spec.feed_forward):
        if isinstance(block, DenseSpec):
            yield "a dense block", block.width
        if isinstance(block, MoeSpec):
            yield "an expert", block.width
            if block.shared_width:
                yield "a shared expert", block.shared_width


def _cut_at_groups(group: int, num_kv_heads: int, num_shards: int) -> tuple[Span, ...]:
    """Whole groups for each shard, or, with more shards than groups, whole shards for each group as far as it has heads."""
    if num_shards <= num_kv_heads:
        return tuple((start * group, end * group) for start, end in cut(num_kv_heads, num_shards))
    parts: list[Span] = []
    for kv_head, (first, last) in enumerate(cut(num_shards, num_kv_heads)):
        parts.extend((kv_head * group + start, kv_head * group + end) for start, end in cut(group, last - first))
    return tuple(parts)


def _with_kv_heads(heads: tuple[Span, ...], group: int) -> tuple[HeadCut, ...]:
    return tuple(HeadCut((start, end), (start // group, -(-end // group))) for start, end in heads)


def _size(span: Span) -> int:
    return span[1] - span[0]


def _check(num_shards: int, most: int, what: str) -> None:
    if num_shards < 1:
        raise TopologyError(f"a mesh needs at least 1 shard, found {num_shards}")
    if num_shards > most:
        raise TopologyError(f"{what} cannot be cut into {num_shards} shards, at most into {most}: use fewer shards")
