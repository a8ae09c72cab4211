"""What the rest of the coordinator knows of discovery: a source of addresses, and a lease."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class WorkerSource(Protocol):
    """Where workers are found."""

    def addresses(self) -> AsyncGenerator[tuple[str, ...]]:
        """Give all addresses of workers, each time that they are others than before, for ever.

        They come in an order that every coordinator sees alike. What cannot be asked is asked again: the last answer holds
        until there is another.
        """


class PlanLease(Protocol):
    """Which of several coordinators may hand out plans."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def holder(self) -> str:
        """Who holds it as far as is known, for people; empty: nobody."""

    @property
    def term(self) -> int | None:
        """Number of this coordinator's term, which rises from holder to holder; None while it does not surely hold the lease."""

    @property
    def shards(self) -> int | None:
        """How many shards all coordinators want, as far as is known; None: nobody said."""

    async def wait_seen(self) -> None:
        """Wait until it is known what the lease says."""

    async def wait_shards(self, known: int | None) -> int | None:
        """Wait until another number of shards is wanted than `known`, and return it."""

    async def ask_shards(self, num_shards: int) -> None:
        """Tell all coordinators that so many shards are wanted.

        Raises:
            NotServing: it cannot be told at present.

        """

    async def begin_term_after(self, term: int) -> int:
        """Begin a term with a higher number than `term`, which workers have seen: a lease was made anew; return the number.

        Raises:
            NotServing: this coordinator holds the lease no more.

        """

    async def run(self) -> None:
        """Try to get the lease and to keep it, for ever."""

    async def release(self) -> None:
        """Let it go, so that others need not wait until it runs out. Idempotent."""
