"""What a round cost: the record that benchmarks, timelines and metrics are made of.

Tuples, because they are made between rounds, where nothing else happens in a mesh: a frozen dataclass takes three times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Answer(NamedTuple):
    """One worker's part of a round."""

    compute_ns: int
    """Arithmetic, by the worker's clock."""
    queue_ns: int
    """From arrival at the worker to the start of the arithmetic, by the worker's clock."""
    arrived_ns: int
    """When the answer was parsed here, `time.perf_counter_ns`; answers are parsed in shard order."""
    num_bytes: int
    """Of the answer on the wire, without framing."""
    received_ns: int
    """When the answer was here, whether or not an earlier shard's was still awaited; `time.perf_counter_ns`."""


class Round(NamedTuple):
    """One request to all shards and their answers; times are `time.perf_counter_ns` of the coordinator."""

    action: str
    """Field name in `ExecuteRequest`: open, project, attend, feed_forward, head."""
    layer: int | None
    """None where the action has no layer."""
    step: int
    num_rows: int
    started_ns: int
    """Before the request was serialized."""
    written_ns: int
    """When it was handed to the transport for the last shard."""
    request_bytes: int
    """To each worker, without framing."""
    answers: tuple[Answer, ...]
    """In shard order."""
    workers: tuple[str, ...]
    """Addresses, in shard order."""
    experts: bytes
    """Chosen for each row: i32 [rows, k], row-major, little-endian; empty where the round has no routed experts."""

    @property
    def ended_ns(self) -> int:
        """When the last answer had arrived."""
        return max(answer.arrived_ns for answer in self.answers)

    @property
    def overhead_ns(self) -> int:
        """What the round took beyond its slowest worker's arithmetic."""
        return self.ended_ns - self.started_ns - max(answer.compute_ns for answer in self.answers)


RoundObserver = Callable[[Round], None]


class RoundObservers(list[RoundObserver]):
    """Whoever wants to hear of rounds at present; false while nobody does, and then no record is made of them."""

    def __call__(self, one: Round) -> None:
        """Tell all of them."""
        for observer in self:
            observer(one)
