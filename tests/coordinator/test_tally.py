"""Where the time of rounds goes: four parts for each worker, by phase."""

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.rounds import Answer, Round
from coordinator.tally import Phase, Tally


def step_of(*rows: tuple[int, bool]) -> Any:
    """Rows of each sequence, and whether its next token is drawn."""
    each = [SimpleNamespace(num_rows=count, samples=samples) for count, samples in rows]
    return SimpleNamespace(rows=each, num_rows=sum(count for count, _ in rows))


ROUND = Round(
    action="attend",
    layer=0,
    step=2,
    num_rows=1,
    started_ns=1000,
    written_ns=1010,
    request_bytes=50,
    answers=(Answer(300, 20, 2000, 70, 1500), Answer(600, 10, 2100, 80, 1900)),
    workers=("a", "b"),
    experts=b"",
)


def test_compute_queue_wire_and_wait_add_up_to_the_round() -> None:
    tally = Tally()
    tally.begin_step(step_of((1, True)), 2)
    tally.add(ROUND)
    tally.add(ROUND)
    found = tally.phases[Phase.DECODE]
    assert (found.num_rounds, found.round_ns, found.slowest_ns) == (2, 1800, 1200)
    a, b = found.workers["a"], found.workers["b"]
    assert (a.compute_ns, a.queue_ns, a.wire_ns, a.wait_ns) == (600, 40, 360, 800)
    assert (b.compute_ns, b.queue_ns, b.wire_ns, b.wait_ns) == (1200, 20, 580, 0)
    assert all(one.compute_ns + one.queue_ns + one.wire_ns + one.wait_ns == found.round_ns for one in (a, b))
    assert (a.sent_bytes, a.received_bytes, b.received_bytes) == (100, 140, 160)
    assert found.straggler_ratio == pytest.approx(600 / 450)


@pytest.mark.parametrize(
    ("rows", "phase"),
    [
        (((1, True), (1, True)), Phase.DECODE),
        (((1, True), (5, True)), Phase.PREFILL),
        (((1, True), (1, False)), Phase.PREFILL),
    ],
)
def test_a_step_has_a_phase_and_so_have_the_rounds_of_both_its_halves(rows: tuple[tuple[int, bool], ...], phase: Phase) -> None:
    tally = Tally()
    tally.begin_step(step_of(*rows), 10)
    for number in (9, 10, 11, 12):
        tally.add(ROUND._replace(step=number))
    tally.end_step()
    assert {one: found.num_rounds for one, found in tally.phases.items() if found.num_rounds} == {phase: 2, Phase.CANARY: 2}
    found = tally.phases[phase]
    assert (found.num_steps, found.num_rows) == (1, sum(count for count, _ in rows))
    assert found.step_ns > 0


def test_opening_a_session_is_no_round() -> None:
    tally = Tally()
    tally.add(ROUND._replace(action="open", layer=None, num_rows=0))
    assert all(found.num_rounds == 0 for found in tally.phases.values())


def test_workers_that_are_gone_are_forgotten_and_others_are_summed_over_phases() -> None:
    tally = Tally()
    tally.begin_step(step_of((1, True)), 2)
    tally.add(ROUND)
    tally.add(ROUND._replace(step=99))
    assert tally.worker("a").compute_ns == 600
    tally.keep(["b", "c"])
    assert tally.worker("a").compute_ns == tally.worker("c").compute_ns == 0
    assert tally.worker("b").compute_ns == 1200
