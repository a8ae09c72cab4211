"""RMS norm (Zhang and Sennrich 2019), in the order of roundings that transformers uses."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, mean_square: torch.Tensor | None = None) -> torch.Tensor:
    """Divide by the root mean square in float32, round to the dtype of `x`, then multiply by the weight.

    Args:
        x: [..., n].
        weight: broadcasts with `x`.
        eps: added to the mean square.
        mean_square: float32, broadcasts with `x`; where it is not that of the last dimension of `x` (a norm over all heads of
            a model of which `x` holds some).

    """
    wide = x.float()
    if mean_square is None:
        mean_square = wide.square().mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)
