"""Rotary position embedding over contiguous halves (Su et al. 2021, in the NeoX arrangement of pairs).

Scaling variants that do not depend on the length of the text (linear, llama3, yarn) are in the frequencies already; the
dynamic one is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardworker.kernels.interface import HeadSpec, Span


class Rotation(NamedTuple):
    """Tables of a step, in the dtype of the heads that are rotated: [rows, 1, rotary_dims]."""

    cos: torch.Tensor
    sin: torch.Tensor
    """Its first half is negated, so that the halves of a head need only be swapped."""


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype) -> Rotation:
    """Compute cos and sin of all angles in float32, times `factor`, rounded to `dtype`.

    Args:
        positions: [rows], integers.
        frequencies: radians per position, float32 [rotary_dims / 2], or [rows, rotary_dims / 2].
        factor: attention factor (YaRN), otherwise 1.
        dtype: of the result.

    """
    angles = positions.float().unsqueeze(-1) * frequencies  # [rows, rotary_dims / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return Rotation(torch.cat((cos, cos), -1).to(dtype).unsqueeze(1), torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1))


def dynamic_frequencies(lengths: torch.Tensor, base: float, factor: float, original: int, rotary_dims: int) -> torch.Tensor:
    """NTK-aware frequencies of texts of `lengths` tokens, float32 [rows, rotary_dims / 2].

    transformers' `_compute_dynamic_ntk_parameters`, in float32 as there: the base grows with the length beyond `original`.
    """
    stretch = factor * lengths.clamp(min=original).float() / original - (factor - 1)  # [rows]
    bases = base * stretch ** (rotary_dims / (rotary_dims - 2))
    exponents = torch.arange(0, rotary_dims, 2, device=lengths.device).float() / rotary_dims
    return 1.0 / bases.unsqueeze(-1) ** exponents


def rotate(heads: torch.Tensor, tables: Rotation) -> torch.Tensor:
    """Rotate the first dimensions of each head, [rows, heads, head_dim]; the others pass unchanged."""
    dims = tables.cos.shape[-1]
    turned = heads if dims == heads.shape[-1] else heads[..., :dims]
    first, second = turned.split(dims // 2, -1)
    turned = turned * tables.cos + torch.cat((second, first), -1) * tables.sin
    return turned if dims == heads.shape[-1] else torch.cat((turned, heads[..., dims:]), -1)


def span_rotation(heads: HeadSpec, spans: Sequence[Span], dtype: torch.dtype) -> Rotation | None:
    """Rotary tables of a step's rows; none where heads are not rotated."""
    if heads.rotary_dims == 0 or heads.num_heads == 0:
        return None
    device = heads.inverse_frequencies.device
    counts = [span.rows.stop - span.rows.start for span in spans]
    positions = torch.tensor(
        [position for span, count in zip(spans, counts, strict=True) for position in range(span.position, span.position + count)],
        device=device,
    )
    frequencies = heads.inverse_frequencies
    if heads.dynamic is not None:
        base, factor, original = heads.dynamic
        prompts = [span.prompt_tokens for span, count in zip(spans, counts, strict=True) for _ in range(count)]
        lengths = torch.maximum(torch.tensor(prompts, device=device), positions + 1)
        scaled = dynamic_frequencies(lengths, base, factor, original, heads.rotary_dims)
        frequencies = torch.where((lengths > original).unsqueeze(-1), scaled, frequencies)
    return rotation(positions, frequencies, heads.attention_factor, dtype)
