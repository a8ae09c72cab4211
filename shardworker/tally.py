"""What a worker's rounds cost, added up by action since start."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class ActionTally:
    """Rounds of one action; times in nanoseconds."""

    num_rounds: int = 0
    compute_ns: int = 0
    queue_ns: int = 0


@dataclass(slots=True)
class RoundTally:
    """All rounds of all sessions."""

    actions: defaultdict[str, ActionTally] = field(default_factory=lambda: defaultdict(ActionTally))
    """Served, by their field names in `ExecuteRequest`."""
    faults: Counter[str] = field(default_factory=Counter)
    """Refused or failed, by the reason of the error."""

    def add(self, action: str, compute_ns: int, queue_ns: int) -> None:
        """Count a round that was served."""
        tally = self.actions[action]
        tally.num_rounds += 1
        tally.compute_ns += compute_ns
        tally.queue_ns += queue_ns
