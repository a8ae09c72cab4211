"""Records of rounds become costs of a step."""

from __future__ import annotations

import pytest

from coordinator.bench.statistics import (
    Spread,
    StepCost,
    covered_ns,
    decode_window,
    overheads_us,
    prefill_window,
    step_cost,
    worker_compute_s,
)
from tests.coordinator.bench.rounds import MS, make_round, make_steps


def test_spread_of_values() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(1.0, 2.5, 10.0)
    assert Spread.of([7.0]).as_dict() == {"min": 7.0, "median": 7.0, "max": 7.0}


def test_window_of_one_stream_begins_after_the_step_of_its_first_token() -> None:
    # Two chunks of a prompt, then three decode steps; only the second chunk samples.
    rounds = [one for one in make_steps([5, 5, 1, 1, 1]) if (one.step, one.action) != (1, "head")]
    window = decode_window(rounds, 1)
    assert window is not None
    assert window.num_steps == 3
    assert {one.step for one in window.rounds} == {3, 4, 5}
    assert window.started_ns == max(one.ended_ns for one in rounds if one.step == 2)
    assert window.ended_ns == max(one.ended_ns for one in rounds)


def test_a_prompt_is_what_comes_before() -> None:
    rounds = [one for one in make_steps([5, 5, 1, 1]) if (one.step, one.action) != (1, "head")]
    window = decode_window(rounds, 1)
    assert window is not None
    prompt = prefill_window(rounds, window)
    assert {one.step for one in prompt.rounds} == {1, 2}
    cost = step_cost(prompt)
    # From 0 to the end of the second step's head at 34 ms, in 5 rounds.
    assert (cost.total_ms, cost.rounds, cost.compute_ms, cost.wire_ms, cost.coordinator_ms) == (34, 5, 15, 5, 14)


@pytest.mark.parametrize("prompt_rows", [1, 2])
def test_a_prompt_of_few_tokens_is_no_decode_step(prompt_rows: int) -> None:
    window = decode_window(make_steps([prompt_rows, 1, 1]), 1)
    assert window is not None
    assert window.num_steps == 2


def test_window_of_many_streams_is_where_all_of_them_decode() -> None:
    # Streams join at steps 1 and 2 and leave after steps 4 and 5.
    window = decode_window(make_steps([4, 5, 2, 2, 1], sampled=[1, 2, 2, 2, 1]), 2)
    assert window is not None
    assert {one.step for one in window.rounds} == {3, 4}


def test_a_step_in_two_halves_is_one_step() -> None:
    halves = [make_round("head", step=step, started_ms=10 * step + half, num_rows=2) for step in (1, 2, 3) for half in (0, 3)]
    window = decode_window(halves, 4)
    assert window is not None
    assert (window.num_steps, len(window.rounds)) == (2, 4)


def test_the_second_half_of_a_prompts_step_is_no_decode_step() -> None:
    rounds = [one for one in make_steps([70, 70, 4, 4], sampled=[4, 0, 4, 4]) if one.num_rows]
    window = decode_window(rounds, 4)
    assert window is not None
    assert {one.step for one in window.rounds} == {3, 4}


@pytest.mark.parametrize("sampled", [[1], [1, 1], [2], [0, 0, 0]])
def test_no_window_where_never_all_decode(sampled: list[int]) -> None:
    assert decode_window(make_steps([1] * len(sampled), sampled=sampled), 2) is None
    assert decode_window([], 2) is None


def test_parts_of_a_token_add_up() -> None:
    # Each step: attend 0-4, feed_forward 5-9, head 10-14 ms, then a gap of 6 ms; two workers compute 3 and 2 of each 4 ms.
    window = decode_window(make_steps([1, 1, 1]), 1)
    assert window is not None
    cost = step_cost(window)
    assert cost == StepCost(
        total_ms=20, compute_ms=9, wire_ms=3, wait_ms=3, coordinator_ms=8, rounds=3, bytes_sent=600, bytes_received=330
    )
    assert cost.compute_ms + cost.wire_ms + cost.coordinator_ms == cost.total_ms
    assert worker_compute_s(window) == pytest.approx((0.009, 0.006))


def test_costs_of_repeats_are_medians_of_each_part() -> None:
    costs = [StepCost(*([float(value)] * 8)) for value in (1, 5, 2)]
    assert StepCost.median(costs) == costs[2]
    assert set(costs[0].as_dict()) == {
        *("total_ms", "compute_ms", "wire_ms", "wait_ms", "coordinator_ms", "rounds", "bytes_sent", "bytes_received"),
    }


def test_time_of_overlapping_rounds_counts_once() -> None:
    rounds = [make_round("attend", started_ms=start) for start in (0, 2, 3, 20)]
    assert covered_ns(rounds) == (7 + 4) * MS
    assert covered_ns([]) == 0


def test_a_round_within_another_adds_nothing() -> None:
    rounds = [make_round("attend", started_ms=0, lasted_ms=10), make_round("attend", started_ms=2, lasted_ms=4)]
    assert covered_ns(rounds) == 10 * MS


def test_overheads_are_sorted_by_action() -> None:
    found = overheads_us(make_steps([1, 1]))
    assert found == {"attend": [1000, 1000], "feed_forward": [1000, 1000], "head": [1000, 1000]}
