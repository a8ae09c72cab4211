"""Quantized weights: symmetric, in groups of 32 along the input dimension.

Scales are float16, as in GGUF's Q8_0 and Q4_0: they are read with every weight, so their bytes are speed, and weights on such
a file's grid come back exactly. A group whose scale underflows (all weights below 1e-6) becomes zero. Values are rounded
against the rounded scale.

The arithmetic, for whoever computes the same bits elsewhere. All of it is float32, each operation rounded by itself (no fused
multiply-add); a last group is filled up with zeros; `half` rounds to the nearest float16, ties to even.

int8: scale = half(max |w| / 127), inverse = 1 / scale (0 where the scale is 0), value = w * inverse rounded to the nearest
integer, ties to even, and clamped to [-127, 127].

int4: a nibble n in [0, 15] stands for (n - 8) * scale. e is the first of the weights whose |w| is the largest. For each
divisor of `DIVISORS`, in order:

    scale = half(e / divisor)
    inverse = 1 / scale                             0 where the scale is 0
    n[i] = floor(w[i] * inverse + 8.5)              clamped to [0, 15]
    t[i] = ((n[i] - 8) * scale - w[i]) squared
    error = the sum of t by halves                  t[:16] + t[16:], of that [:8] + [8:], then 4, 2 and 1

and the first divisor of the least error wins. -8 is Q4_0's choice and stands first, so that weights on its grid stay on it.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from protos.tensors import BLOCK

INT4_BITS = 4
INT8_BITS = 8

DIVISORS = (-8.0, -7.0, 7.0, -6.0, 6.0)
"""What the largest weight of a group becomes in int4, in units of the scale.

Whole numbers within [-8, 7], so that it keeps its value: divisors that cut it off, or fall between, lessen the squared error more
(by 15 % instead of 6 % on SmolLM2) and the model's likelihoods no less, or harm them.
"""

SEARCHED_GROUPS = 4096
"""At a time: what is tried then stays in a cache (512 KiB)."""


def quantize(block: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [n, in] to (values, scales) in the layout of `GroupedWeight`."""
    rows, inputs = block.shape
    groups = functional.pad(block.float(), (0, -inputs % BLOCK)).view(-1, BLOCK)
    if bits == INT8_BITS:
        scales = (groups.abs().amax(-1) / 127).half()
        values = (groups * _inverse(scales).unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    else:
        scales = torch.empty(len(groups), dtype=torch.float16, device=groups.device)
        values = torch.empty((len(groups), BLOCK // 2), dtype=torch.uint8, device=groups.device)
        for start in range(0, len(groups), SEARCHED_GROUPS):
            part = slice(start, start + SEARCHED_GROUPS)
            nibbles, scales[part] = _search(groups[part].T.contiguous())
            low, high = nibbles.split(BLOCK // 2)
            values[part] = (low | high << 4).T
    return values.view(rows, -1), scales.view(rows, -1)


def _search(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [32, groups] give the nibbles, uint8 [32, groups], and float16 scales [groups] of the least error."""
    extreme = groups.gather(0, groups.abs().argmax(0, keepdim=True)).squeeze(0)
    nibbles = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    scales = torch.empty(extreme.shape, dtype=torch.float16, device=groups.device)
    least = torch.full_like(extreme, math.inf)
    for number, divisor in enumerate(DIVISORS):
        tried = (extreme / divisor).half()
        found = (groups * _inverse(tried)).add_(8.5).floor_().clamp_(0, 15)
        codes = found.to(torch.uint8)
        error = _sum_by_halves(found.sub_(8).mul_(tried.float()).sub_(groups).square_())
        better = (error < least) | (number == 0)
        nibbles = torch.where(better, codes, nibbles)
        scales = torch.where(better, tried, scales)
        least = torch.where(better, error, least)
    return nibbles, scales


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().reciprocal_().masked_fill_(scales == 0, 0)


def _sum_by_halves(terms: torch.Tensor) -> torch.Tensor:
    """[32, groups] -> [groups]; overwrites `terms`."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = terms[:half].add_(terms[half:])
    return terms[0]
