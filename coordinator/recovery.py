"""What broke, and what it cost: the record from which status, metrics and the log tell of recoveries."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import structlog

log = structlog.get_logger(__name__)

PARTS = ("detect", "assemble", "canary", "replay")
"""Of a recovery, in the order of time."""


@dataclass(slots=True)
class Recovery:
    """From the failure of one mesh to the callers' next tokens on another; times in nanoseconds."""

    failure: str
    """What broke the mesh, for people."""
    obstacle: str = ""
    """Why there was no other mesh at the latest attempt that failed; empty if none did."""
    detect_ns: int = 0
    """From the start of the step that broke; 0 if none was under way."""
    assemble_ns: int = 0
    """Finding, loading and opening workers, failed attempts included."""
    canary_ns: int = 0
    """The token that proves the new mesh."""
    replay_ns: int = 0
    """Until every interrupted request had its next token, or its end; 0 until then, or if there was none."""

    _whole_ns: int = 0

    def note_whole(self) -> None:
        """Take note that another mesh serves."""
        self._whole_ns = time.monotonic_ns()

    def note_resumed(self) -> None:
        """Take note that the last of the interrupted requests goes on, or has ended."""
        # They may all end before there is another mesh.
        if self._whole_ns:
            self.replay_ns = time.monotonic_ns() - self._whole_ns
            log.info("all requests go on", replay_ms=self.replay_ns // 1_000_000, stall_ms=self.stall_ns // 1_000_000)

    @property
    def stall_ns(self) -> int:
        """The longest pause that a caller saw."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Give the parts so far, nanoseconds by name."""
        return dict(zip(PARTS, (self.detect_ns, self.assemble_ns, self.canary_ns, self.replay_ns), strict=True))


@dataclass(slots=True)
class Recoveries:
    """All since start."""

    failures: Counter[str] = field(default_factory=Counter)
    """Meshes that broke, by the reason of the error."""
    count: int = 0
    """Meshes that took the place of a broken one."""
    latest: Recovery | None = None
    """None before the first failure."""
    _earlier: Counter[str] = field(default_factory=Counter)

    def begin(self, reason: str, recovery: Recovery) -> None:
        """Count a mesh that broke, and begin the recovery from it.

        Args:
            reason: of the error.
            recovery: without the times that will come.

        """
        self._earlier.update(self.latest.parts() if self.latest else {})
        self.failures[reason] += 1
        self.latest = recovery

    def parts(self) -> dict[str, int]:
        """Add up the parts of all recoveries, nanoseconds by name; together they are the stalls that callers saw."""
        latest = self.latest.parts() if self.latest else dict.fromkeys(PARTS, 0)
        return {part: self._earlier[part] + latest[part] for part in PARTS}
