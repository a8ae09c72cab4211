"""The cable of some length: frames come out late, in order, and not without end."""

from __future__ import annotations

import math

from bench.relay import _MAX_FRAMES, DelayLine


def test_frames_come_out_after_the_delay_in_order() -> None:
    line = DelayLine(0.5, math.inf)
    line.put(b"a", 10.0)
    line.put(b"b", 10.2)
    line.put(b"c", 10.4)
    assert line.next_s == 10.5
    assert line.take(10.4) == []
    assert line.take(10.75) == [b"a", b"b"]
    assert line.take(10.75) == []
    assert line.take(11) == [b"c"]
    assert line.next_s is None


def test_frames_leave_one_after_the_other_and_are_sent_on_whole() -> None:
    line = DelayLine(1.0, 100.0)
    line.put(b"x" * 10, 0.0)
    line.put(b"y" * 20, 0.0)
    assert line.next_s == 0.1 + 1.0 + 0.1
    assert line.take(1.3) == [b"x" * 10]
    assert line.take(1.49) == []
    assert line.take(1.51) == [b"y" * 20]


def test_what_is_too_much_is_lost() -> None:
    line = DelayLine(1.0, math.inf)
    for _ in range(_MAX_FRAMES + 1):
        line.put(b"x", 0.0)
    assert len(line.take(1.0)) == _MAX_FRAMES
