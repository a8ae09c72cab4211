"""Gated feed-forward blocks: down(silu(gate(x)) * up(x)), one for all rows or one for each row's chosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from shardworker.kernels.interface import Weight


def feed_forward(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, hidden] -> [rows, hidden]; `gate_up` holds the gate's columns first: [2 * columns, hidden]."""
    gate, up = gate_up.matmul(x, gate_up_bias).chunk(2, -1)
    return down.matmul(functional.silu(gate) * up, down_bias)


def experts(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight) -> torch.Tensor:
    """Weighted sum of each row's experts, in float32.

    A row's sum runs in ascending order of expert, whatever else is in the batch. The product of an expert is rounded to the
    dtype of the arithmetic as in transformers; its weight and the sum are float32.

    Args:
        x: [rows, hidden].
        chosen: expert ids, [rows, k], on the CPU, distinct within a row.
        weights: float32 [rows, k].
        gate_up: [experts, 2 * columns, hidden].
        down: [experts, hidden, columns].

    Returns:
        float32 [rows, hidden].

    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if down.num_inputs == 0:
        return out
    if x.shape[0] == 1:
        for expert, weight in sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True)):
            out.add_(feed_forward(x, gate_up.expert(expert), down.expert(expert)), alpha=weight)
        return out
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    active, counts = flat[order].unique_consecutive(return_counts=True)
    rows = order.div(chosen.shape[1], rounding_mode="floor").to(x.device)
    row_weights = weights.flatten()[order.to(weights.device)].to(x.device).unsqueeze(-1)
    for expert, part, scale in zip(active.tolist(), rows.split(counts.tolist()), row_weights.split(counts.tolist()), strict=True):
        out.index_add_(0, part, feed_forward(x[part], gate_up.expert(expert), down.expert(expert)) * scale)
    return out
