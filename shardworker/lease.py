"""Ends a session that nobody drives any more: its coordinator died without a word, hangs, or is cut off."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Self

from protos import rpc
from protos.errors import StaleEpoch

if TYPE_CHECKING:
    from types import TracebackType


MAX_LEASE_S = 86400.0


class Lease:
    """A context that is left with `StaleEpoch` once it was not renewed for its seconds, at first `protos.rpc.LEASE_S`.

    Renewing is two assignments, because every round does it; one timer looks when the lease may be over.
    """

    def __init__(self) -> None:
        self._seconds = rpc.LEASE_S
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._renewed = self._loop.time()
        self._timer = self._loop.call_later(rpc.LEASE_S, self._look)

    def extend(self, seconds: float) -> None:
        """Allow another silence from now on, up to a day."""
        self._seconds = min(seconds, MAX_LEASE_S)
        self._timer.cancel()
        self._timer = self._loop.call_later(self._seconds, self._look)

    def renew(self) -> None:
        """Begin to count anew."""
        self._renewed = self._loop.time()

    def suspend(self) -> None:
        """Do not count until the next `renew`: the session waits for this worker, not for its coordinator."""
        self._renewed = math.inf

    def _look(self) -> None:
        left = self._renewed + self._seconds - self._loop.time()
        if left <= 0:
            self._timeout.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(min(left, self._seconds), self._look)

    async def __aenter__(self) -> Self:
        """Use as a context."""
        await self._timeout.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop counting.

        Raises:
            StaleEpoch: the lease is over.

        """
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise StaleEpoch(f"the session was silent for {self._seconds:g} s and is over: open another") from None
