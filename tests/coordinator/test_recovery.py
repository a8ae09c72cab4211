"""Recoveries are counted with what each part of them cost."""

from coordinator.recovery import PARTS, Recoveries, Recovery


def test_parts_are_summed_over_recoveries_the_latest_as_it_goes() -> None:
    recoveries = Recoveries()
    assert recoveries.parts() == dict.fromkeys(PARTS, 0)
    recoveries.begin("WORKER_LOST", Recovery("a died", detect_ns=1, assemble_ns=2, canary_ns=3, replay_ns=4))
    latest = Recovery("b lies", detect_ns=10)
    recoveries.begin("WRONG_RESULT", latest)
    latest.assemble_ns = 20
    assert recoveries.parts() == {"detect": 11, "assemble": 22, "canary": 3, "replay": 4}
    assert recoveries.failures == {"WORKER_LOST": 1, "WRONG_RESULT": 1}
    assert recoveries.latest is latest
    assert latest.stall_ns == 30


def told_of(recoveries: Recoveries) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    recoveries.on_end = lambda reason, recovery: told.append((reason, recovery.failure))
    return told


def test_a_recovery_is_over_when_the_mesh_is_whole_and_the_last_request_goes_on_in_either_order() -> None:
    recoveries = Recoveries()
    told = told_of(recoveries)
    for failure in ("a died", "b died"):
        recovery = Recovery(failure)
        recoveries.begin("WORKER_LOST", recovery)
        steps = [recovery.note_whole, recovery.note_resumed]
        for step in steps if failure == "a died" else reversed(steps):
            assert ("WORKER_LOST", failure) not in told
            step()
        recovery.end()
        assert (recovery.replay_ns > 0) == (failure == "a died")
    assert told == [("WORKER_LOST", "a died"), ("WORKER_LOST", "b died")]


def test_a_recovery_whose_replays_the_next_failure_cuts_short_is_over_then() -> None:
    recoveries = Recoveries()
    told = told_of(recoveries)
    first = Recovery("a died")
    recoveries.begin("WORKER_LOST", first)
    first.note_whole()
    recoveries.begin("WRONG_RESULT", Recovery("b lies"))
    assert told == [("WORKER_LOST", "a died")]
