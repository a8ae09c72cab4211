"""Quantized weights: symmetric, in groups of 32 along the input dimension.

Scales are float16, as in GGUF's Q8_0 and Q4_0: they are read with every weight, so their bytes are speed, and weights on such
a file's grid come back exactly. A group whose scale underflows (all weights below 1e-6) becomes zero. Values are rounded
against the rounded scale.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from protos.tensors import BLOCK

INT4_BITS = 4
INT8_BITS = 8


def quantize(block: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [n, in] to (values, scales) in the layout of `GroupedWeight`.

    int8: scale = max |w| / 127, value = round(w / scale). int4 (Q4_0): scale = w of the largest |w| / -8,
    value = floor(w / scale + 8.5) in [0, 15], standing for (value - 8) * scale.
    """
    rows, inputs = block.shape
    groups = functional.pad(block.float(), (0, -inputs % BLOCK)).view(rows, -1, BLOCK)
    if bits == INT8_BITS:
        scales = (groups.abs().amax(-1) / 127).half()
        values = (groups / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)
        return values.view(rows, -1), scales
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = (extreme / -8).half()
    nibbles = (groups / _divisor(scales)).add_(8.5).floor_().clamp_(0, 15).to(torch.uint8)
    low, high = nibbles.split(BLOCK // 2, -1)
    return (low | high << 4).view(rows, -1), scales


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().masked_fill(scales == 0, math.inf).unsqueeze(-1)
