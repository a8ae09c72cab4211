"""What is known of a row's logits: the best candidates of all shards merged, or the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
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
    # By numpy: with few candidates, what counts is the number of calls, and torch's are dearer.
    all_logits = np.concatenate([shard.numpy() for shard in logits], axis=1).astype(np.float64)  # [rows, sum of c]
    all_ids = np.concatenate([shard.numpy() for shard in ids], axis=1).astype(np.int64)
    floors = np.full(len(all_logits), -math.inf)
    for shard, whole in zip(logits, complete, strict=True):
        if not whole:
            floors = np.maximum(floors, shard[:, -1].numpy())
    order = np.lexsort((all_ids, -all_logits), axis=1)
    all_ids, all_logits = np.take_along_axis(all_ids, order, 1), np.take_along_axis(all_logits, order, 1)
    # Several tokens may share the floor's logit and only some of them be listed: those are not certain. The first one is: each
    # shard's argmax prefers the lower id.
    certain = np.maximum((all_logits > floors[:, None]).sum(axis=1), 1)
    normalizers = np.logaddexp.reduce([shard.numpy() for shard in logsumexps], axis=0)  # [rows, 2]
    listed = zip(all_ids, all_logits, certain.tolist(), floors.tolist(), normalizers.tolist(), strict=True)
    return [
        RowScores(torch.from_numpy(row_ids[:count]), torch.from_numpy(row_logits[:count]), floor, plain, scaled)
        for row_ids, row_logits, count, floor, (plain, scaled) in listed
    ]
