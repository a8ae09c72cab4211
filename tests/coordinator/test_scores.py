"""Merging the shards' candidates: only what is certain is listed."""

import math

import pytest
import torch

from coordinator.scores import from_logits, merge_candidates


def merge(shards: list[list[tuple[int, float]]], complete: list[bool]) -> list[tuple[int, float]]:
    scores = merge_candidates(
        [torch.tensor([[token for token, _ in shard]], dtype=torch.int32) for shard in shards],
        [torch.tensor([[logit for _, logit in shard]]) for shard in shards],
        [torch.zeros(1, 2, dtype=torch.float64) for _ in shards],
        complete,
    )[0]
    return list(zip(scores.ids.tolist(), scores.logits.tolist(), strict=True))


def test_merge_lists_what_is_above_every_floor() -> None:
    assert merge([[(1, 5.0), (0, 3.0)], [(7, 4.0), (8, 1.0)]], [False, False]) == [(1, 5.0), (7, 4.0)]


def test_merge_of_a_complete_shard_has_no_floor_of_it() -> None:
    assert merge([[(1, 5.0), (0, 3.0)], [(7, 4.0), (8, 1.0)]], [True, False]) == [(1, 5.0), (7, 4.0), (0, 3.0)]
    assert merge([[(1, 5.0), (0, 3.0)], [(7, 4.0), (8, 1.0)]], [True, True])[-1] == (8, 1.0)


def test_merge_keeps_the_best_even_at_the_floor_and_prefers_lower_ids() -> None:
    assert merge([[(3, 5.0), (4, 5.0)], [(7, 5.0), (9, 5.0)]], [False, False]) == [(3, 5.0)]
    assert merge([[(3, 5.0), (4, 5.0)], [(7, 5.0), (9, 5.0)]], [True, True]) == [(3, 5.0), (4, 5.0), (7, 5.0), (9, 5.0)]


def test_merge_adds_the_shards_sums() -> None:
    sums = [torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([[2.0, 0.25]], dtype=torch.float64)]
    candidate = [torch.tensor([[0]], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32)]
    scores = merge_candidates(candidate, [torch.tensor([[1.0]]), torch.tensor([[0.0]])], sums, [False, False])[0]
    assert scores.logsumexp == pytest.approx(math.log(math.exp(1) + math.exp(2)), rel=1e-15)
    assert scores.scaled_logsumexp == pytest.approx(math.log(math.exp(0.5) + math.exp(0.25)))
    assert (scores.floor, scores.complete) == (1.0, False)


def test_all_logits_are_complete_and_sorted_by_logit_then_id() -> None:
    scores = from_logits(torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.bfloat16), 2.0)
    assert scores.complete
    assert scores.ids.tolist() == [1, 3, 0, 2]
    assert scores.scaled_logsumexp == pytest.approx(math.log(2 * math.exp(0.5) + 2 * math.exp(1.5)))
