"""What happens to a head between projection and attention: norm, clamp, rotation, and its place among keys and values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shaped(
    x,
    dim,
    norm,
    scale,
    clip,
    HAS_NORM: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    DIM: tl.constexpr,
):
    """Some dimensions of a head, normed and clamped, float32; rounded where `rms_norm` rounds."""
    part = tl.load(x + dim, mask=dim < DIM, other=0.0)
    wide = part.to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        wide = ((wide * scale).to(part.dtype).to(tl.float32) * weight).to(part.dtype).to(tl.float32)
    if HAS_CLIP:
        wide = tl.minimum(tl.maximum(wide, -clip), clip)
    return wide


@triton.jit
def turned(
    x,
    part,
    dim,
    norm,
    scale,
    clip,
    cos,
    sin,
    HAS_NORM: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Rotate `part`, what `shaped` gave for all dimensions of `x`; those from ROTARY on stay."""
    is_rotary = dim < ROTARY
    partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
    other = shaped(x, tl.where(is_rotary, partner, dim), norm, scale, clip, HAS_NORM, HAS_CLIP, DIM)
    c = tl.load(cos + dim, mask=is_rotary, other=1.0).to(tl.float32)
    s = tl.load(sin + dim, mask=is_rotary, other=0.0).to(tl.float32)
    return part * c + other * s


@triton.jit
def place_heads(
    qkv,
    norm,
    mean_squares,
    cos,
    sin,
    slots,
    q_out,
    keys,
    values,
    eps,
    clip,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """Norm, clamp and rotate one head of one row, and store it; a program is (row, head of qkv).

    Args:
        qkv: [rows, HEADS + 2 * KV_HEADS, DIM].
        norm: [HEADS + KV_HEADS, DIM]; read with HAS_NORM.
        mean_squares: float32 [rows, HEADS + KV_HEADS]; read with HAS_MEAN, otherwise a head's own are taken.
        cos: [rows, ROTARY]; `sin` too, its first half negated.
        slots: int32 [rows], where keys and values go; below 0: nowhere.
        q_out: [rows, HEADS, DIM].
        keys: [KV_HEADS, slots, DIM], heads `head_stride` elements apart; `values` too.

    """
    row, head, dim = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    is_dim = dim < DIM
    x = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM
    slot = tl.load(slots + row).to(tl.int64)
    if head >= HEADS + KV_HEADS:
        value = shaped(x, dim, norm, 0.0, clip, False, HAS_CLIP, DIM)
        if slot >= 0:
            at = (head - HEADS - KV_HEADS).to(tl.int64) * head_stride + slot * DIM + dim
            tl.store(values + at, value.to(values.dtype.element_ty), mask=is_dim)
    else:
        scale = 0.0
        if HAS_MEAN:
            scale = tl.rsqrt(tl.load(mean_squares + row * (HEADS + KV_HEADS) + head) + eps)
        elif HAS_NORM:
            wide = tl.load(x + dim, mask=is_dim, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
        norm += head * DIM
        part = shaped(x, dim, norm, scale, clip, HAS_NORM, HAS_CLIP, DIM)
        if ROTARY > 0:
            cos += row * ROTARY
            part = turned(x, part, dim, norm, scale, clip, cos, sin + row * ROTARY, HAS_NORM, HAS_CLIP, DIM, ROTARY)
        if head < HEADS:
            tl.store(q_out + (row * HEADS + head) * DIM + dim, part.to(q_out.dtype.element_ty), mask=is_dim)
        elif slot >= 0:
            at = (head - HEADS).to(tl.int64) * head_stride + slot * DIM + dim
            tl.store(keys + at, part.to(keys.dtype.element_ty), mask=is_dim)
