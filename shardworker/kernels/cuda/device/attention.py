"""Causal grouped-query attention over keys and values where they lie, in pages.

Many query rows against one kv head: the query heads of one row that read it (decoding), or the rows of a prompt. Softmax is
taken while reading, in float32, token by token in order, so a row's result depends on its own text alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(
    q,
    keys,
    values,
    pages,
    tokens,
    visible,
    best,
    weight,
    mixed,
    scale,
    end,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Take some more tokens in: the greatest score, the sum of weights, and the weighted sum of values, of each query.

    Args:
        q: [queries, WIDTH].
        keys: of one kv head, [slots, DIM].
        values: as `keys`.
        pages: of the sequence.
        tokens: [n], positions.
        visible: [queries, n].
        best: float32 [queries].
        weight: float32 [queries].
        mixed: float32 [queries, WIDTH].
        scale: multiplies q.k.
        end: no position from here on is read.
        PAGE: tokens of a page.
        DIM: of a head.
        WIDTH: the power of 2 that holds it.

    """
    dim = tl.arange(0, WIDTH)
    is_read = tokens < end
    page = tl.load(pages + tokens // PAGE, mask=is_read, other=0)
    slot = page.to(tl.int64) * PAGE + tokens % PAGE
    at = slot[:, None] * DIM + dim[None, :]
    mask = is_read[:, None] & (dim < DIM)[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible & is_read[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    shrink = tl.exp(best - higher)
    part = tl.exp(scores - higher[:, None])
    v = tl.load(values + at, mask=mask, other=0.0)
    mixed = tl.dot(part.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
    return higher, weight * shrink + tl.sum(part, 1), mixed


@triton.jit
def attend_split(
    q,
    keys,
    values,
    decoding,
    page_table,
    group_starts,
    mixed_out,
    best_out,
    weight_out,
    scale,
    head_stride,
    num_pages,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Attend from the last row of a sequence to one stretch of its tokens, for the query heads of one kv head.

    A program is (row, kv head, stretch of SPLIT tokens); what it finds is joined by `join_splits`.

    Args:
        q: [step rows, HEADS, DIM].
        keys: [kv_heads, slots, DIM], heads `head_stride` elements apart.
        values: as `keys`.
        decoding: from `Tables`.
        page_table: int32 [sequences, num_pages].
        group_starts: from `Tables`.
        mixed_out: float32 [rows, HEADS, splits, DIM].
        best_out: float32 [rows, HEADS, splits]; `weight_out` too.
        GROUP: the most query heads of a kv head, as a power of 2 from 16.

    """
    entry, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, sequence = tl.load(decoding + entry * 4), tl.load(decoding + entry * 4 + 1)
    length = tl.load(decoding + entry * 4 + 2)
    start = split * SPLIT
    if start < length:
        end = tl.minimum(start + SPLIT, length)
        head, dim = tl.load(group_starts + kv_head) + tl.arange(0, GROUP), tl.arange(0, WIDTH)
        is_head = head < tl.load(group_starts + kv_head + 1)
        mask = is_head[:, None] & (dim < DIM)[None, :]
        mine = tl.load(q + (row * HEADS + head[:, None]) * DIM + dim[None, :], mask=mask, other=0.0)
        k, v = keys + kv_head.to(tl.int64) * head_stride, values + kv_head.to(tl.int64) * head_stride
        best = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
        weight = tl.zeros((GROUP,), dtype=tl.float32)
        mixed = tl.zeros((GROUP, WIDTH), dtype=tl.float32)
        pages = page_table + sequence * num_pages
        for first in range(start, end, STEP):
            tokens = first + tl.arange(0, STEP)
            visible = tl.full((GROUP, STEP), 1, dtype=tl.int1)
            best, weight, mixed = fold(mine, k, v, pages, tokens, visible, best, weight, mixed, scale, end, PAGE, DIM, WIDTH)
        part = (entry * HEADS + head).to(tl.int64) * tl.num_programs(2) + split
        tl.store(mixed_out + part[:, None] * DIM + dim[None, :], mixed, mask=mask)
        tl.store(best_out + part, best, mask=is_head)
        tl.store(weight_out + part, weight, mask=is_head)


@triton.jit
def join_splits(
    mixed_in,
    best_in,
    weight_in,
    decoding,
    out,
    num_splits,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join the stretches of a row's head, first to last; a program is (row, head). `out` is [step rows, HEADS, DIM]."""
    entry, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(decoding + entry * 4 + 2)
    if length > 0:
        dim = tl.arange(0, WIDTH)
        best = -float("inf")
        weight = 0.0
        mixed = tl.zeros((WIDTH,), dtype=tl.float32)
        for split in range(tl.cdiv(length, SPLIT)):
            part = (entry * HEADS + head).to(tl.int64) * num_splits + split
            other = tl.load(best_in + part)
            higher = tl.maximum(best, other)
            shrink, grow = tl.exp(best - higher), tl.exp(other - higher)
            weight = weight * shrink + tl.load(weight_in + part) * grow
            mixed = mixed * shrink + tl.load(mixed_in + part * DIM + dim, mask=dim < DIM, other=0.0) * grow
            best = higher
        row = tl.load(decoding + entry * 4)
        tl.store(out + (row * HEADS + head) * DIM + dim, (mixed / weight).to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit
def attend_prompt(
    q,
    keys,
    values,
    tiles,
    page_table,
    kv_head_of,
    out,
    scale,
    head_stride,
    num_pages,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Attend from consecutive rows of one sequence to all tokens up to each; a program is (tile, query head).

    Args:
        q: [step rows, HEADS, DIM].
        keys: [kv_heads, slots, DIM], heads `head_stride` elements apart.
        values: as `keys`.
        tiles: from `Tables`.
        page_table: int32 [sequences, num_pages].
        kv_head_of: from `Tables`.
        out: [step rows, HEADS, DIM].
        ROWS: of a tile, a power of 2 from 16.

    """
    tile, head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    first_row = tl.load(tile)
    num_rows = tl.load(tile + 1)
    position = tl.load(tile + 2)
    sequence = tl.load(tile + 3)
    index = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    mask = (index < num_rows)[:, None] & (dim < DIM)[None, :]
    at = ((first_row + index).to(tl.int64)[:, None] * HEADS + head) * DIM + dim[None, :]
    mine = tl.load(q + at, mask=mask, other=0.0)
    kv_head = tl.load(kv_head_of + head).to(tl.int64)
    k, v = keys + kv_head * head_stride, values + kv_head * head_stride
    best = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    end = position + num_rows
    pages = page_table + sequence * num_pages
    for first in range(0, end, STEP):
        tokens = first + tl.arange(0, STEP)
        visible = tokens[None, :] <= (position + index)[:, None]
        best, weight, mixed = fold(mine, k, v, pages, tokens, visible, best, weight, mixed, scale, end, PAGE, DIM, WIDTH)
    tl.store(out + at, (mixed / weight[:, None]).to(out.dtype.element_ty), mask=mask)
