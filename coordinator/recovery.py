"""What broke, and what it cost: the record from which status, metrics and the log tell of recoveries."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

log = structlog.get_logger(__name__)

PARTS = ("detect", "assemble", "canary", "replay")
"""Of a recovery, in the order of time."""


@dataclass(slots=True)
class Recovery:
    """From the end of one mesh to the callers' next tokens on another; times in nanoseconds."""

    failure: str
    """What broke the mesh, for people; empty if it was cut anew."""
    obstacle: str = ""
    """Why there was no other mesh at the latest attempt that failed; empty if none did."""
    obstructed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once an attempt failed."""
    detect_ns: int = 0
    """From the start of the step that is lost with the mesh; 0 if none was under way."""
    assemble_ns: int = 0
    """Finding, loading and opening workers, failed attempts included."""
    canary_ns: int = 0
    """The token that proves the new mesh."""
    replay_ns: int = 0
    """Until every interrupted request had its next token, or its end; 0 until then, or if there was none."""

    broken_ns: int = field(default_factory=time.monotonic_ns)
    """When the mesh was found broken, `time.monotonic_ns`."""
    whole_ns: int = 0
    """When another mesh served, `time.monotonic_ns`; 0 until then."""
    on_end: Callable[[], None] = lambda: None
    """Called once, when another mesh serves and no interrupted request waits for its next token."""
    _resumed: bool = False

    def note_obstacle(self, error: Exception) -> None:
        """Take note of why an attempt failed."""
        self.obstacle = str(error)
        self.obstructed.set()

    def note_whole(self) -> None:
        """Take note that another mesh serves."""
        self.whole_ns = time.monotonic_ns()
        if self._resumed:
            self.end()

    def note_resumed(self) -> None:
        """Take note that the last of the interrupted requests goes on, or has ended, or that there was none."""
        self._resumed = True
        # They may all end before there is another mesh.
        if self.whole_ns:
            self.replay_ns = time.monotonic_ns() - self.whole_ns
            log.info("all requests go on", replay_ms=self.replay_ns // 1_000_000, stall_ms=self.stall_ns // 1_000_000)
            self.end()

    def end(self) -> None:
        """Tell that nothing of it will change any more. Idempotent."""
        on_end, self.on_end = self.on_end, lambda: None
        on_end()

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
    reshards: int = 0
    """Meshes of another number of shards that took the place of one."""
    latest: Recovery | None = None
    """None before the first."""
    on_end: Callable[[str, Recovery], None] = lambda _reason, _recovery: None
    """Told of each that is over, with the reason of the error that broke the mesh; empty if it was cut anew."""
    _earlier: Counter[str] = field(default_factory=Counter)

    def begin(self, reason: str, recovery: Recovery) -> None:
        """Count a mesh that broke, and begin the recovery from it; or the change to one of another number of shards.

        Args:
            reason: of the error; empty if there is none.
            recovery: without the times that will come.

        """
        if reason:
            self.failures[reason] += 1
        if self.latest:
            # Its replays are cut short, if they are under way still: the next mesh is to end them.
            self.latest.end()
            self._earlier.update(self.latest.parts())
        recovery.on_end = lambda: self.on_end(reason, recovery)
        self.latest = recovery

    def parts(self) -> dict[str, int]:
        """Add up the parts of all recoveries, nanoseconds by name; together they are the stalls that callers saw."""
        latest = self.latest.parts() if self.latest else dict.fromkeys(PARTS, 0)
        return {part: self._earlier[part] + latest[part] for part in PARTS}
