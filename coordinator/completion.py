"""The tokens of one request on their way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.request import FinishReason
from protos.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from coordinator.sampler import Choice
    from coordinator.sequence import Sequence


ABORTED = "abort"
"""Outcome of a completion whose caller left."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a completion went, nanoseconds."""

    queue_ns: int
    prefill_ns: int
    decode_ns: int


class Completion:
    """The tokens of one request, as they come."""

    def __init__(self, sequence: Sequence, drop: Callable[[Sequence], None]) -> None:
        """Made by `Engine.submit`; `drop` ends the work on a sequence."""
        self.reason: FinishReason | None = None
        self.outcome = ABORTED
        """Why no token follows: the lower-case name of a `FinishReason`, the reason of an error, or `ABORTED`."""
        self.sequence = sequence
        self._drop = drop
        self._events: asyncio.Queue[Choice | FinishReason | MeshError] = asyncio.Queue()
        self._arrived_ns = time.monotonic_ns()
        self._started_ns = self._first_ns = self._last_ns = 0

    async def tokens(self) -> AsyncIterator[Choice]:
        """Yield each token; `reason` is set afterwards.

        Raises:
            MeshError: the completion cannot go on.

        """
        while True:
            event = await self._events.get()
            if isinstance(event, MeshError):
                # Many completions may share it: without this each raise would add to the last one's traceback.
                raise event.with_traceback(None)
            if isinstance(event, FinishReason):
                self.reason = event
                return
            yield event

    def cancel(self) -> None:
        """Stop the work before the next step. Idempotent."""
        self._drop(self.sequence)

    def stop(self) -> None:
        """Stop the work because the text so far holds a stop text. Idempotent."""
        self.outcome = FinishReason.STOP.name.lower()
        self.cancel()

    @property
    def elapsed_ns(self) -> int:
        """Time since arrival."""
        return time.monotonic_ns() - self._arrived_ns

    @property
    def timings(self) -> Timings:
        """Times so far."""
        started = self._started_ns or time.monotonic_ns()
        first = self._first_ns or started
        return Timings(started - self._arrived_ns, first - started, max(0, self._last_ns - first))

    def start(self) -> None:
        """Note that the first rows are on their way."""
        self._started_ns = self._started_ns or time.monotonic_ns()

    def put(self, choice: Choice) -> int:
        """Pass a token on; give the nanoseconds since the one before it, or since arrival."""
        before_ns, self._last_ns = self._last_ns or self._arrived_ns, time.monotonic_ns()
        self._first_ns = self._first_ns or self._last_ns
        self._events.put_nowait(choice)
        return self._last_ns - before_ns

    def end(self, event: FinishReason | MeshError) -> None:
        """Pass on that nothing follows."""
        self.outcome = event.name.lower() if isinstance(event, FinishReason) else event.reason
        self._events.put_nowait(event)
