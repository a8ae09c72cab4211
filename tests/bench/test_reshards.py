"""The table of changes, and what is made of the times at which tokens came."""

from __future__ import annotations

import pytest

from bench.reshards import Arrivals, Change, markdown
from tests.faults.streams import Outcome


def test_table_has_medians_and_ranges_of_each_way() -> None:
    changes = [
        Change(num_shards, took_s, 1.0, 0.0, 0.0, 0.5, 40.0, 10.0, 0.25)
        for num_shards, took_s in ((4, 3.0), (2, 9.0), (4, 1.0), (4, 2.5))
    ]
    *_, there, back = markdown([("beside", changes)]).splitlines()
    assert there == (
        "| beside | 2 to 4 | 3 | 2.50 [1.00-3.00] | 1.00 [1.00-1.00] | 0.00 | 0.00 | 0.50 | 40.0 | 10.0 | 0.25 [0.25-0.25] "
        "| 0.25 [0.25-0.25] |"
    )
    assert back.startswith("| beside | 4 to 2 | 1 | 9.00 [9.00-9.00] |")


def test_rates_and_pauses_are_those_of_a_span() -> None:
    arrivals = Arrivals()
    # The first message of each is no token.
    arrivals.take(Outcome(arrived_s=[0.0, 1.0, 2.0, 5.0]))
    arrivals.take(Outcome(arrived_s=[0.5, 1.5, 4.0, 4.5]))
    assert arrivals.rate(1.0, 3.0) == pytest.approx(1.5)
    assert arrivals.pause(3.0) == (2.0, 5.0)
    assert arrivals.gap(1.0, 4.5) == pytest.approx(2.0)
