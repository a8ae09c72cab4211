"""Rounds become a Chrome trace."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.bench.timeline import COORDINATOR, FIRST_WORKER, WIRE, trace_events
from coordinator.rounds import Round
from tests.coordinator.bench.rounds import make_round, make_steps


def spans(rounds: list[Round], process: int, track: str) -> list[dict[str, Any]]:
    """Complete events of a track."""
    events = trace_events(rounds)
    threads = {e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == process and e["args"]["name"] == track}
    return [event for event in events if event["ph"] == "X" and event["pid"] == process and event["tid"] in threads]


def times(events: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    return [(event["name"], event["ts"], event["dur"]) for event in events]


def test_no_rounds_no_events() -> None:
    assert trace_events([]) == []


def test_every_event_is_one_of_the_format_and_can_be_written() -> None:
    events = trace_events(make_steps([3, 1]))
    assert json.loads(json.dumps(events)) == events
    for event in events:
        assert event["ph"] in {"X", "M"}
        if event["ph"] == "X":
            assert {"name", "pid", "tid", "ts", "dur"} <= set(event)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"coordinator", "wire", "worker 0", "worker 1"}


def test_steps_rounds_and_the_gaps_between_them() -> None:
    rounds = make_steps([3, 1])
    assert times(spans(rounds, COORDINATOR, "steps")) == [("step 1", 0, 14_000), ("step 2", 20_000, 14_000)]
    assert times(spans(rounds, COORDINATOR, "rounds"))[:3] == [
        ("attend 0", 0, 4000),
        ("feed_forward 0", 5000, 4000),
        ("head", 10_000, 4000),
    ]
    assert times(spans(rounds, COORDINATOR, "between rounds")) == [
        ("reduce, norm, gate", 4000, 1000),
        ("reduce, norm", 9000, 1000),
        ("sample, emit, schedule, embed, norm", 14_000, 6000),
        ("reduce, norm, gate", 24_000, 1000),
        ("reduce, norm", 29_000, 1000),
    ]


@pytest.mark.parametrize(
    ("before", "after", "name"), [("project", "attend", "sum of squares"), ("feed_forward", "attend", "reduce, norm")]
)
def test_a_gap_is_named_for_what_falls_there(before: str, after: str, name: str) -> None:
    rounds = [make_round(before, started_ms=0), make_round(after, started_ms=5)]
    assert [span["name"] for span in spans(rounds, COORDINATOR, "between rounds")] == [name]


def test_a_workers_time_lies_in_the_middle_of_its_round() -> None:
    rounds = [make_round("attend", layer=7, lasted_ms=4.1, compute_ms=(3, 2))]
    # Of 4.1 ms 0.1 are queue and 3 (or 2) compute: 0.5 (or 1) each way.
    assert times(spans(rounds, FIRST_WORKER, "queue")) == [("attend 7", 500, 100)]
    assert times(spans(rounds, FIRST_WORKER, "compute")) == [("attend 7", 600, 3000)]
    assert times(spans(rounds, FIRST_WORKER + 1, "compute")) == [("attend 7", 1100, 2000)]
    assert times(spans(rounds, WIRE, "slowest worker")) == [("attend 7: request", 0, 500), ("attend 7: answer", 3600, 500)]


def test_a_worker_that_says_it_took_longer_than_its_round_ends_late_but_begins_in_time() -> None:
    rounds = [make_round("attend", layer=0, lasted_ms=1, compute_ms=(3,))]
    assert times(spans(rounds, FIRST_WORKER, "compute")) == [("attend 0", 100, 3000)]
    assert times(spans(rounds, WIRE, "slowest worker"))[1] == ("attend 0: answer", 3100, 0)


def test_rounds_that_overlap_get_tracks_of_their_own() -> None:
    rounds = [make_round("attend", layer=0, started_ms=start) for start in (0, 2, 4)]
    found = spans(rounds, COORDINATOR, "rounds")
    assert [event["tid"] for event in found] == [found[0]["tid"], found[0]["tid"] + 1, found[0]["tid"]]
    assert spans(rounds, COORDINATOR, "between rounds") == []
