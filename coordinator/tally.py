"""What the rounds of a mesh cost, added up by phase and worker.

The time of a round, from before it is serialized until the last answer is there, is for each worker the sum of four parts:
compute (its arithmetic) and queue (waiting for its device), both by its own clock; wire (the way there and back); and wait (its
answer lay here, and it had nothing to do, until the slowest worker's came).
"""

from __future__ import annotations

import enum
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.microbatches import LIMIT

if TYPE_CHECKING:
    from collections.abc import Collection

    from coordinator.rounds import Round
    from coordinator.scheduler import Step

_RECENT = 256
"""Rounds after which earlier ones count for a third in the straggler ratio."""


class Phase(enum.Enum):
    """What a step does."""

    PREFILL = "prefill"
    """It has rows of a prompt, or of a journal that is replayed; rows of running streams may be among them."""
    DECODE = "decode"
    """One row of each stream."""
    CANARY = "canary"
    """The coordinator's own token."""


def phase_of(step: Step) -> Phase:
    """Say what a step of callers' requests does."""
    return Phase.PREFILL if any(rows.num_rows > 1 or not rows.samples for rows in step.rows) else Phase.DECODE


@dataclass(slots=True)
class WorkerTally:
    """One worker's part in the rounds of a phase."""

    compute_ns: int = 0
    queue_ns: int = 0
    wire_ns: int = 0
    wait_ns: int = 0
    sent_bytes: int = 0
    """To the worker, without framing."""
    received_bytes: int = 0
    """From the worker, without framing."""


@dataclass(slots=True)
class PhaseTally:
    """All rounds of a phase."""

    num_steps: int = 0
    num_rows: int = 0
    """Of all steps."""
    step_ns: int = 0
    """From scheduling a step to its tokens; steps that broke a mesh are left out."""
    num_rounds: int = 0
    round_ns: int = 0
    """From before a round was serialized until its last answer was there; rounds of two halves of a step overlap."""
    slowest_ns: int = 0
    """Compute of each round's slowest worker."""
    workers: defaultdict[str, WorkerTally] = field(default_factory=lambda: defaultdict(WorkerTally))
    """By address."""
    _recent_slowest: float = 0.0
    _recent_mean: float = 0.0

    @property
    def straggler_ratio(self) -> float:
        """Compute of the slowest worker over the mean of all, of the latest rounds: 1 is even; 0 before the first round."""
        return self._recent_slowest / self._recent_mean if self._recent_mean else 0.0

    def add(self, one: Round) -> None:
        """Add a round."""
        # Between two rounds nothing else happens in a mesh: this is written for speed.
        answers = one.answers
        started_ns, request_bytes = one.started_ns, one.request_bytes
        ended_ns = max([answer.received_ns for answer in answers])
        computes = [answer.compute_ns for answer in answers]
        slowest_ns = max(computes)
        for worker, answer, compute_ns in zip([self.workers[address] for address in one.workers], answers, computes, strict=True):
            received_ns, queue_ns = answer.received_ns, answer.queue_ns
            worker.compute_ns += compute_ns
            worker.queue_ns += queue_ns
            worker.wire_ns += received_ns - started_ns - compute_ns - queue_ns
            worker.wait_ns += ended_ns - received_ns
            worker.sent_bytes += request_bytes
            worker.received_bytes += answer.num_bytes
        self.num_rounds += 1
        self.round_ns += ended_ns - started_ns
        self.slowest_ns += slowest_ns
        self._recent_slowest += slowest_ns - self._recent_slowest / _RECENT
        self._recent_mean += sum(computes) / len(computes) - self._recent_mean / _RECENT


class Tally:
    """All phases."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.phases = {phase: PhaseTally() for phase in Phase}
        self._phase = Phase.CANARY
        self._steps = range(0)
        self._started_ns = 0

    def begin_step(self, step: Step, number: int) -> None:
        """Count the rounds of steps number <= i < number + `LIMIT` for this step's phase; all others are the canary's."""
        self._phase = phase_of(step)
        self._steps = range(number, number + LIMIT)
        tally = self.phases[self._phase]
        tally.num_steps += 1
        tally.num_rows += step.num_rows
        self._started_ns = time.perf_counter_ns()

    def end_step(self) -> None:
        """Count the time of the step that was begun."""
        self.phases[self._phase].step_ns += time.perf_counter_ns() - self._started_ns

    def add(self, one: Round) -> None:
        """Count a round; opening a session is none."""
        if one.num_rows == 0:
            return
        self.phases[self._phase if one.step in self._steps else Phase.CANARY].add(one)

    def worker(self, address: str) -> WorkerTally:
        """Add up one worker's phases."""
        parts = [phase.workers[address] for phase in self.phases.values() if address in phase.workers]
        return WorkerTally(*(sum(getattr(part, name) for part in parts) for name in WorkerTally.__slots__))

    def keep(self, addresses: Collection[str]) -> None:
        """Forget workers that are gone for good: where addresses change with every restart, their number would grow for ever."""
        for phase in self.phases.values():
            for gone in phase.workers.keys() - set(addresses):
                del phase.workers[gone]
