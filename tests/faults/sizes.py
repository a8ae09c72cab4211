"""Resident sets of processes over the rounds of a soak: does anything grow?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.programs import Program

SETTLED_ROUNDS = 4
"""After so many rounds a process has done what it usually does: what it has then is its usual size."""
MIB = 2**20


@dataclass
class Size:
    """Of one process."""

    name: str
    rounds: int = 0
    """In which it took part."""
    settled_bytes: int = 0
    """After the last of the rounds that it takes to settle."""
    last_bytes: int = 0
    """After its last round."""

    def note(self, rss_bytes: int) -> None:
        """Take its resident set after a round."""
        self.rounds += 1
        self.last_bytes = rss_bytes
        if self.rounds <= SETTLED_ROUNDS:
            self.settled_bytes = rss_bytes

    @property
    def growth(self) -> float:
        """Since it had settled, as a fraction."""
        return self.last_bytes / self.settled_bytes - 1

    def __str__(self) -> str:
        """Say it, for people."""
        return (
            f"{self.name}: {self.settled_bytes / MIB:.1f} MiB after {SETTLED_ROUNDS} rounds, {self.last_bytes / MIB:.1f} MiB "
            f"after {self.rounds} ({100 * self.growth:+.1f} %)"
        )


@dataclass
class Sizes:
    """Of all processes, those that are gone included."""

    _by_pid: dict[int, Size] = field(default_factory=dict)

    def note(self, name: str, program: Program, weights_bytes: int = 0) -> None:
        """Take a program's resident set after a round, without the weights that it holds."""
        self._by_pid.setdefault(program.pid, Size(name)).note(program.rss_bytes - weights_bytes)

    def settled(self) -> list[Size]:
        """Give those that lived on after they had settled."""
        return [size for size in self._by_pid.values() if size.rounds > SETTLED_ROUNDS]
