"""Tiles of products with weights that are dense, or quantized and expanded on the way from memory to the tensor cores.

A row's result does not depend on what the other rows of its tile hold: an element of a tile is a sum over its own row and
column in an order that block sizes alone decide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread(scales, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[OUTPUTS, GROUPS] -> [OUTPUTS, GROUPS * WIDTH]: each scale beside the values that it is for."""
    wide = tl.broadcast_to(tl.expand_dims(scales.to(tl.float32), 2), (OUTPUTS, GROUPS, WIDTH))
    return tl.reshape(wide, (OUTPUTS, GROUPS * WIDTH))


@triton.jit
def multiply_dense(x_starts, is_row, weight_starts, is_output, total, INPUTS: tl.constexpr, STEP: tl.constexpr):
    """Add the products of `multiply` for weights in the dtype of `x`."""
    for start in range(0, INPUTS, STEP):
        at = start + tl.arange(0, STEP)[None, :]
        left = tl.load(x_starts + at, mask=is_row & (at < INPUTS), other=0.0)
        right = tl.load(weight_starts + at, mask=is_output & (at < INPUTS), other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def multiply_int8(
    x_starts,
    is_row,
    weight_starts,
    scale_starts,
    is_output,
    total,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the products of `multiply` for int8."""
    GROUPS: tl.constexpr = (INPUTS + 31) // 32
    for start in range(0, INPUTS, STEP):
        at = start + tl.arange(0, STEP)[None, :]
        group = start // 32 + tl.arange(0, STEP // 32)[None, :]
        scale = tl.load(scale_starts + group, mask=is_output & (group < GROUPS), other=0.0)
        whole = tl.load(weight_starts + at, mask=is_output & (at < GROUPS * 32), other=0)
        left = tl.load(x_starts + at, mask=is_row & (at < INPUTS), other=0.0)
        right = (whole.to(tl.float32) * spread(scale, OUTPUTS, STEP // 32, 32)).to(left.dtype)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def multiply_int4(
    x_starts,
    is_row,
    weight_starts,
    scale_starts,
    is_output,
    total,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the products of `multiply` for int4: a byte holds elements i and i + 16 of a group, so each half is a product."""
    GROUPS: tl.constexpr = (INPUTS + 31) // 32
    byte = tl.arange(0, STEP // 2)[None, :]
    for start in range(0, INPUTS, STEP):
        group = start // 32 + tl.arange(0, STEP // 32)[None, :]
        scale = tl.load(scale_starts + group, mask=is_output & (group < GROUPS), other=0.0)
        scale = spread(scale, OUTPUTS, STEP // 32, 16)
        pairs = tl.load(weight_starts + start // 2 + byte, mask=is_output & (start // 2 + byte < GROUPS * 16), other=0)
        low = start + byte // 16 * 32 + byte % 16
        left = tl.load(x_starts + low, mask=is_row & (low < INPUTS), other=0.0)
        right = (((pairs & 15).to(tl.float32) - 8.0) * scale).to(left.dtype)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        left = tl.load(x_starts + low + 16, mask=is_row & (low + 16 < INPUTS), other=0.0)
        right = (((pairs >> 4).to(tl.float32) - 8.0) * scale).to(left.dtype)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def multiply(
    x,
    x_rows,
    values,
    scales,
    outputs,
    is_output,
    INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Multiply rows of `x` by the transpose of rows of a weight: float32 [ROWS, OUTPUTS].

    Args:
        x: [any, INPUTS], rows follow each other.
        x_rows: int64 [ROWS]; below 0: none, zeros.
        values: [any, INPUTS], or as in `GroupedWeight`.
        scales: as in `GroupedWeight`; not read of dense weights.
        outputs: int64 [OUTPUTS], rows of the weight.
        is_output: [OUTPUTS]; false: not read, zeros.
        INPUTS: of a row.
        BITS: 4, 8, or 0 for dense.
        ROWS: a power of 2, at least 16.
        OUTPUTS: likewise.
        STEP: inputs at a time, a power of 2, at least 32.

    """
    GROUPS: tl.constexpr = (INPUTS + 31) // 32
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    is_row, is_read = (x_rows >= 0)[:, None], is_output[:, None]
    x_starts, scale_starts = x + x_rows[:, None] * INPUTS, scales + outputs[:, None] * GROUPS
    if BITS == 0:
        total = multiply_dense(x_starts, is_row, values + outputs[:, None] * INPUTS, is_read, total, INPUTS, STEP)
    elif BITS == 8:
        starts = values + outputs[:, None] * (GROUPS * 32)
        total = multiply_int8(x_starts, is_row, starts, scale_starts, is_read, total, INPUTS, OUTPUTS, STEP)
    else:
        starts = values + outputs[:, None] * (GROUPS * 16)
        total = multiply_int4(x_starts, is_row, starts, scale_starts, is_read, total, INPUTS, OUTPUTS, STEP)
    return total


@triton.jit
def linear(
    x,
    values,
    scales,
    bias,
    out,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of x @ weight.T + bias; a program each. Tiles that read the same weights follow each other."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    row = (tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) // row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    x_rows = tl.where(row < num_rows, row, -1)
    total = multiply(x, x_rows, values, scales, column, column < NUM_OUTPUTS, INPUTS, BITS, ROWS, OUTPUTS, STEP)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < NUM_OUTPUTS, other=0.0).to(tl.float32)[None, :]
    mask = (row < num_rows)[:, None] & (column < NUM_OUTPUTS)[None, :]
    tl.store(out + row[:, None] * NUM_OUTPUTS + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_up(
    x,
    values,
    scales,
    out,
    order,
    tile_experts,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of silu(x @ gate.T) * (x @ up.T) of one expert: out [rows * CHOSEN, COLUMNS], in the dtype of `x`.

    `order` and `tile_experts` are `Routes`'s. Output 2i of the tile is a gate, 2i + 1 its up, so one product serves both.
    """
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert >= 0:
        slot = tl.load(order + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        output = tl.arange(0, OUTPUTS)
        column = tl.program_id(1) * (OUTPUTS // 2) + output // 2
        weight_row = expert.to(tl.int64) * (2 * COLUMNS) + output % 2 * COLUMNS + column
        x_rows = tl.where(slot >= 0, slot // CHOSEN, -1)
        both = multiply(x, x_rows, values, scales, weight_row, column < COLUMNS, INPUTS, BITS, ROWS, OUTPUTS, STEP)
        gate, up = tl.split(tl.reshape(both, (ROWS, OUTPUTS // 2, 2)))
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        to = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        mask = (slot >= 0)[:, None] & (to < COLUMNS)[None, :]
        tl.store(out + slot[:, None] * COLUMNS + to[None, :], hidden.to(out.dtype.element_ty), mask=mask)


@triton.jit
def down(
    x,
    values,
    scales,
    out,
    order,
    tile_experts,
    slot_weights,
    HIDDEN: tl.constexpr,
    INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of weight * (x @ down.T) of one expert: `x` and out, float32 [rows * CHOSEN, HIDDEN], by slot."""
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert >= 0:
        slot = tl.load(order + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        weight_row = expert.to(tl.int64) * HIDDEN + column
        total = multiply(x, slot, values, scales, weight_row, column < HIDDEN, INPUTS, BITS, ROWS, OUTPUTS, STEP)
        total *= tl.load(slot_weights + slot, mask=slot >= 0, other=0.0)[:, None]
        mask = (slot >= 0)[:, None] & (column < HIDDEN)[None, :]
        tl.store(out + slot[:, None] * HIDDEN + column[None, :], total, mask=mask)


@triton.jit
def add_up(products, out, HIDDEN: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr):
    """Sum a row's products, float32 [rows, CHOSEN, HIDDEN] -> [rows, HIDDEN], first slot first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for place in range(CHOSEN):
        total += tl.load(products + (row * CHOSEN + place) * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(out + row * HIDDEN + column, total, mask=column < HIDDEN)
