"""The table of stalls: medians, and the range of what callers saw."""

from __future__ import annotations

from bench.stalls import CASES, Stall, markdown


def test_table_has_medians_and_the_range_of_the_pause() -> None:
    stalls = [Stall(pause, 0.1, 0.2, 0.3, 0.4) for pause in (3.0, 1.0, 2.5)]
    *_, row = markdown([(CASES[0], stalls)]).splitlines()
    assert row == "| warm spare | 3 | 2.50 [1.00-3.00] | 0.10 | 0.20 | 0.30 | 0.40 |"
