"""From records of rounds to what a step cost. Pure.

A token's time is cut into three parts that add up to it: compute (of each round's slowest worker), wire (what a round took beyond
that: serializing, transport, queueing, parsing) and coordinator (while no round was under way: norm, gate, reduce, sampling,
scheduling, and passing the token on). Wait is the part of compute in which the fastest worker had nothing to do.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coordinator.rounds import Round

_MS = 1e6
_US = 1e3


@dataclass(frozen=True, slots=True)
class Spread:
    """What repeated measurements gave."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        return {"min": self.min, "median": self.median, "max": self.max}


@dataclass(frozen=True, slots=True)
class StepCost:
    """Means over the decode steps of one repeat; with one stream a step is a token."""

    total_ms: float
    compute_ms: float
    """Of each round's slowest worker."""
    wire_ms: float
    """Of the rounds, beyond that."""
    wait_ms: float
    """Part of compute: slowest less fastest worker."""
    coordinator_ms: float
    """While no round was under way."""
    rounds: float
    bytes_sent: float
    """To all workers, without framing."""
    bytes_received: float
    """From all workers, without framing."""

    @classmethod
    def median(cls, costs: Sequence[Self]) -> Self:
        """Medians of each part by itself, over repeats; so the parts need not add up to the last digit."""
        return cls(*(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields(cls)))

    def as_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """Consecutive steps in which every stream got one token; prefill is over before the first of them."""

    started_ns: int
    """End of the last round before the first of the steps, or start of the first one."""
    num_steps: int
    rounds: tuple[Round, ...]

    @property
    def ended_ns(self) -> int:
        """End of the last round."""
        return max(one.ended_ns for one in self.rounds)


def decode_window(rounds: Iterable[Round], streams: int) -> DecodeWindow | None:
    """Find the steps in which `streams` streams decode; none if they never all do.

    Args:
        rounds: of one repeat, all its streams started at once.
        streams: how many.

    """
    steps: dict[int, list[Round]] = defaultdict(list)
    for one in rounds:
        steps[one.step].append(one)
    numbers = sorted(steps)
    sampled = {number: sum(one.num_rows for one in steps[number] if one.action == "head") for number in numbers}
    # In the first full step the last stream gets its first token: it belongs to the prefill.
    first = next((index for index, number in enumerate(numbers) if sampled[number] == streams), len(numbers))
    decoding: list[int] = []
    for number in numbers[first + 1 :]:
        if not sampled[number] and not decoding:
            # The other half of that step (`coordinator.microbatches`): the head was asked once for both.
            continue
        if sampled[number] != streams:
            break
        decoding.append(number)
    if not decoding:
        return None
    return DecodeWindow(
        started_ns=max(one.ended_ns for one in steps[numbers[first]]),
        num_steps=len(decoding),
        rounds=tuple(one for number in decoding for one in steps[number]),
    )


def prefill_window(rounds: Sequence[Round], decoding: DecodeWindow) -> DecodeWindow:
    """Take all rounds before the steps of `decoding` for one step: of one stream, its prompt.

    Args:
        rounds: of one repeat.
        decoding: its decode steps.

    """
    steps = {one.step for one in decoding.rounds}
    before = tuple(one for one in rounds if one.step < min(steps))
    return DecodeWindow(min(one.started_ns for one in before), 1, before)


def step_cost(window: DecodeWindow) -> StepCost:
    """Average what a step of the window cost."""
    steps, rounds = window.num_steps, window.rounds
    compute = sum(max(answer.compute_ns for answer in one.answers) for one in rounds)
    fastest = sum(min(answer.compute_ns for answer in one.answers) for one in rounds)
    total = window.ended_ns - window.started_ns
    return StepCost(
        total_ms=total / steps / _MS,
        compute_ms=compute / steps / _MS,
        wire_ms=sum(one.overhead_ns for one in rounds) / steps / _MS,
        wait_ms=(compute - fastest) / steps / _MS,
        coordinator_ms=(total - covered_ns(rounds)) / steps / _MS,
        rounds=len(rounds) / steps,
        bytes_sent=sum(one.request_bytes * len(one.answers) for one in rounds) / steps,
        bytes_received=sum(answer.num_bytes for one in rounds for answer in one.answers) / steps,
    )


def worker_compute_s(window: DecodeWindow) -> tuple[float, ...]:
    """Arithmetic of each worker for one step, seconds, in shard order."""
    by_worker = zip(*([answer.compute_ns for answer in one.answers] for one in window.rounds), strict=True)
    return tuple(sum(times) / window.num_steps / 1e9 for times in by_worker)


def overheads_us(rounds: Iterable[Round]) -> dict[str, list[float]]:
    """What rounds took beyond their slowest worker's arithmetic, microseconds, by action."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        found[one.action].append(one.overhead_ns / _US)
    return dict(found)


def covered_ns(rounds: Iterable[Round]) -> int:
    """Time in which at least one round was under way, nanoseconds."""
    covered = until = 0
    for one in sorted(rounds, key=lambda one: one.started_ns):
        covered += max(0, one.ended_ns - max(until, one.started_ns))
        until = max(until, one.ended_ns)
    return covered
