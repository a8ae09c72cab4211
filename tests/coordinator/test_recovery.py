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
