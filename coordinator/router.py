"""The gate of an MoE layer: which experts a row goes to, with which weights.

Computed once, here, in float32: gates replicated on unlike devices could choose unlike experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coordinator.models.spec import Scoring

if TYPE_CHECKING:
    from coordinator.models.spec import GateSpec

# As in DeepSeek-V3 and GLM-4.5, so that scores that are all 0 do not divide by 0.
_SMALLEST_SUM = 1e-20


@dataclass(frozen=True, slots=True)
class Route:
    """Where the rows of one layer go."""

    experts: torch.Tensor
    """i32 [rows, k], distinct within a row."""
    weights: torch.Tensor
    """f32 [rows, k]."""


def gate_logits(hidden: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a gate, each by itself: in one product, torch rounds a row as the number of rows wants it.

    Args:
        hidden: f32 [rows, hidden].
        router: f32 [experts, hidden].

    Returns:
        f32 [rows, experts], the same bits for a row whatever the others are.

    """
    return torch.bmm(hidden.unsqueeze(1), router.T.expand(len(hidden), -1, -1)).squeeze(1)


def route(logits: torch.Tensor, gate: GateSpec, correction: torch.Tensor | None) -> Route:
    """Choose experts from router logits (Mixtral, Qwen MoE, OLMoE: softmax; DeepSeek-V3, GLM-4.5: sigmoid).

    Args:
        logits: f32 [rows, experts].
        gate: the rule.
        correction: f32 [experts], added to the scores for choosing only; None where the gate has none.

    """
    scores = logits.softmax(dim=-1) if gate.scoring is Scoring.SOFTMAX else logits.sigmoid()
    for_choosing = scores if correction is None else scores + correction
    if gate.num_groups > 1:
        for_choosing = _mask_groups(for_choosing, gate)
    weights, experts = torch.topk(for_choosing, gate.top_k, dim=-1)
    if for_choosing is not scores:
        weights = scores.gather(1, experts)
    if gate.renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total if gate.scoring is Scoring.SOFTMAX else total + _SMALLEST_SUM)
    if gate.scale != 1:
        weights = weights * gate.scale
    return Route(experts.to(torch.int32), weights)


def _mask_groups(scores: torch.Tensor, gate: GateSpec) -> torch.Tensor:
    """Leave only the best groups of experts; a group counts as its two best scores together."""
    grouped = scores.view(len(scores), gate.num_groups, -1)  # [rows, groups, experts of a group]
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(gate.top_groups, dim=-1).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, value=True)
    # Not 0: corrected scores may be negative, and a masked expert must never win.
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(1)
