"""Causal grouped-query attention of one sequence's rows over its keys and values, without copying these per query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HeadGroup", "attention", "causal_mask", "head_groups"]


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Consecutive kv heads of a shard that are each read by equally many of its query heads. Indices within the shard."""

    queries: slice
    kv_heads: slice
    num_kv_heads: int
    queries_per_kv_head: int


def head_groups(kv_head_of: Sequence[int]) -> tuple[HeadGroup, ...]:
    """Cut a shard's heads into runs with equal group size: one where the cut is even, at most three otherwise.

    Args:
        kv_head_of: for each query head of the shard the kv head of the shard that it reads, ascending.

    """
    counts: dict[int, int] = {}
    for kv_head in kv_head_of:
        counts[kv_head] = counts.get(kv_head, 0) + 1
    groups: list[HeadGroup] = []
    query = 0
    for kv_head, count in counts.items():
        if groups and groups[-1].queries_per_kv_head == count:
            last = groups.pop()
            start, query_start = last.kv_heads.start, last.queries.start
        else:
            start, query_start = kv_head, query
        query += count
        groups.append(HeadGroup(slice(query_start, query), slice(start, kv_head + 1), kv_head + 1 - start, count))
    return tuple(groups)


def causal_mask(position: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a chunk of a prompt may see, as an addend: [num_rows, position + num_rows], row i up to position + i."""
    length = position + num_rows
    mask = torch.full((num_rows, length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(position + 1)


def attention(  # noqa: PLR0917  # a formula's terms
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: tuple[HeadGroup, ...],
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(scale * q.k) v, causal.

    Args:
        q: [rows, heads, head_dim], the last rows of the sequence.
        k: [kv_heads, length, head_dim]; the rows' own keys are in it.
        v: as `k`.
        groups: from `head_groups`.
        scale: multiplies q.k.
        mask: `causal_mask` of several rows that do not begin the sequence; absent for one row, and where rows == length.

    Returns:
        [rows, heads, head_dim].

    """
    if len(groups) == 1:
        return _group_attention(q, k, v, groups[0], scale, mask)
    parts = [_group_attention(q[:, g.queries], k[g.kv_heads], v[g.kv_heads], g, scale, mask) for g in groups]
    return torch.cat(parts, 1)


def _group_attention(  # noqa: PLR0917  # a formula's terms
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: HeadGroup, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    rows, heads, dim = q.shape
    k, v = k[None], v[None]
    if rows == 1:
        # The query heads of one kv head stand where rows usually do: keys and values are read once.
        q = q.view(1, group.num_kv_heads, group.queries_per_kv_head, dim)
        return functional.scaled_dot_product_attention(q, k, v, scale=scale).reshape(1, heads, dim)
    # [queries_per_kv_head, kv_heads, rows, head_dim]; keys and values are seen by each without a copy.
    q = q.view(rows, group.num_kv_heads, group.queries_per_kv_head, dim).permute(2, 1, 0, 3)
    k = k.expand(group.queries_per_kv_head, -1, -1, -1)
    v = v.expand(group.queries_per_kv_head, -1, -1, -1)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return mixed.permute(2, 1, 0, 3).reshape(rows, heads, dim)
