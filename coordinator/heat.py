"""Which experts the gates choose: how popular each is of late, and how evenly the rows of a layer are spread.

Rows are counted in bulk: a round only leaves its choices here, and they are added up when there are many, or somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HALF_LIFE = 65536
"""Choices of a layer after which earlier ones count half."""

_BULK_BYTES = 16384
"""Of one layer, as i32: choices that may wait to be counted."""


@dataclass(frozen=True, slots=True)
class LayerHeat:
    """The experts of one layer."""

    num_choices: int
    """Since start: rows times the experts of a row."""
    shares: np.ndarray
    """f64 [experts]: of the layer's choices of late; their sum is 1, or 0 before the first."""

    @property
    def imbalance(self) -> float:
        """Share of the most popular expert over the mean share: 1 is even; 0 before the first choice."""
        return float(self.shares.max()) * len(self.shares)

    def top_shares(self, tops: Sequence[int]) -> dict[int, float]:
        """Give the share of the n most popular experts together, for each n that is below the number of experts."""
        cumulated = np.cumsum(np.sort(self.shares)[::-1])
        return {top: float(cumulated[top - 1]) for top in tops if top < len(cumulated)}


@dataclass(frozen=True, slots=True)
class HotExpert:
    """An expert and its share of its layer's choices of late."""

    layer: int
    expert: int
    share: float
    over_mean: float
    """The share over the layer's mean share: 1 is even."""


class ExpertHeat:
    """All MoE layers of a model."""

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """Start without choices.

        Args:
            num_experts: by MoE layer.

        """
        self._recent = {layer: np.zeros(count) for layer, count in num_experts.items()}
        self._num_choices = dict.fromkeys(num_experts, 0)
        self._waiting: dict[int, list[bytes]] = {layer: [] for layer in num_experts}
        self._waiting_bytes = dict.fromkeys(num_experts, 0)

    def add(self, layer: int, experts: bytes) -> None:
        """Count the choices of a round.

        Args:
            layer: an MoE layer.
            experts: i32 [rows, k], row-major, little-endian.

        """
        self._waiting[layer].append(experts)
        self._waiting_bytes[layer] += len(experts)
        if self._waiting_bytes[layer] >= _BULK_BYTES:
            self._count(layer)

    def layers(self) -> dict[int, LayerHeat]:
        """Give every MoE layer, by its number."""
        heats = {}
        for layer, recent in self._recent.items():
            self._count(layer)
            heats[layer] = LayerHeat(self._num_choices[layer], recent / max(recent.sum(), 1.0))
        return heats

    def hottest(self, count: int) -> list[HotExpert]:
        """Give the experts that are furthest over their layer's mean, all layers together, the hottest first."""
        experts = [
            HotExpert(layer, int(expert), float(heat.shares[expert]), float(heat.shares[expert]) * len(heat.shares))
            for layer, heat in self.layers().items()
            for expert in np.argsort(heat.shares)[-count:]
            if heat.shares[expert] > 0
        ]
        return sorted(experts, key=lambda expert: (-expert.over_mean, expert.layer, expert.expert))[:count]

    def _count(self, layer: int) -> None:
        if not (waiting := self._waiting[layer]):
            return
        chosen = np.frombuffer(b"".join(waiting), "<i4")
        waiting.clear()
        self._waiting_bytes[layer] = 0
        recent = self._recent[layer]
        recent *= 0.5 ** (len(chosen) / HALF_LIFE)
        recent += np.bincount(chosen, minlength=len(recent))
        self._num_choices[layer] += len(chosen)
