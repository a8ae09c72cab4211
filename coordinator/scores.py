"""What is known of a row's logits: the best candidates of all shards merged, or the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class RowScores:
    """Logits of one row, best first, equal ones by lower id; float64 [n], with int64 ids [n].

    Only what is certain is listed: every token of the vocabulary that is not listed has a logit of at most `floor`, and all
    listed ones but perhaps the first are above it.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    floor: float
    """-inf if the whole vocabulary is listed."""
    logsumexp: float
    """Over the whole vocabulary."""
    scaled_logsumexp: float
    """The same of logits / temperature."""

    @property
    def complete(self) -> bool:
        """Whether the whole vocabulary is listed."""
        return self.floor == -math.inf


def from_logits(logits: torch.Tensor, temperature: float) -> RowScores:
    """Score a row of which all logits are known.

    Args:
        logits: [vocabulary], any floating dtype.
        temperature: > 0; 0 (greedy) counts as 1.

    """
    wide = logits.double()
    ordered, ids = torch.sort(wide, descending=True, stable=True)
    return RowScores(
        ids=ids,
        logits=ordered,
        floor=-math.inf,
        logsumexp=float(torch.logsumexp(wide, dim=0)),
        scaled_logsumexp=float(torch.logsumexp(wide / (temperature or 1.0), dim=0)),
    )


def merge_candidates(
    ids: Sequence[torch.Tensor], logits: Sequence[torch.Tensor], logsumexps: Sequence[torch.Tensor], complete: Sequence[bool]
) -> list[RowScores]:
    """Merge the shards' candidates into each row's scores.

    Args:
        ids: of each shard, i32 [rows, c].
        logits: of each shard, f32 [rows, c], best first.
        logsumexps: of each shard, f64 [rows, 2]: plain and scaled by temperature.
        complete: of each shard, whether its c candidates are all of its vocabulary.

    """
    all_logits = torch.cat([shard.double() for shard in logits], dim=1)  # [rows, sum of c]
    all_ids = torch.cat([shard.long() for shard in ids], dim=1)
    floors = torch.full((all_logits.shape[0],), -math.inf, dtype=torch.float64)
    for shard, whole in zip(logits, complete, strict=True):
        if not whole:
            floors = torch.maximum(floors, shard[:, -1].double())
    # By id first, so that the stable sort by logit leaves equal logits in the order of their ids.
    by_id = torch.argsort(all_ids, dim=1, stable=True)
    all_ids, all_logits = all_ids.gather(1, by_id), all_logits.gather(1, by_id)
    ordered, order = torch.sort(all_logits, dim=1, descending=True, stable=True)
    ordered_ids = all_ids.gather(1, order)
    normalizers = torch.logsumexp(torch.stack(list(logsumexps)), dim=0)  # [rows, 2]
    scores = []
    for row, floor in enumerate(floors.tolist()):
        # Several tokens may share the floor's logit and only some of them be listed: those are not certain. The first one
        # is: each shard's argmax prefers the lower id.
        certain = max(1, int((ordered[row] > floor).sum()))
        plain, scaled = normalizers[row].tolist()
        scores.append(RowScores(ordered_ids[row, :certain], ordered[row, :certain], floor, plain, scaled))
    return scores
