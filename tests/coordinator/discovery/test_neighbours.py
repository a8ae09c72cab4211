"""Source and lease, opened and run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from coordinator.discovery.dns import DnsSource
from coordinator.discovery.endpoint_slices import EndpointSliceSource
from coordinator.discovery.lease import KubernetesLease
from coordinator.discovery.neighbours import Neighbours
from protos.errors import InvalidArgument


def test_flags_open_what_they_name() -> None:
    assert Neighbours.open(None, None) == Neighbours()
    assert isinstance(Neighbours.open("dns:w:1", None).source, DnsSource)
    both = Neighbours.open("kubernetes:w:1", "a/b")
    assert isinstance(both.source, EndpointSliceSource)
    assert isinstance(both.lease, KubernetesLease)
    assert both.lease.name == "a/b"


class Source:
    def __init__(self, *said: tuple[str, ...], error: Exception | None = None) -> None:
        self.said, self.error, self.closed = said, error, False

    async def addresses(self) -> AsyncGenerator[tuple[str, ...]]:
        try:
            for said in self.said:
                yield said
            if self.error:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.closed = True


class Lease:
    name, holder, term = "a/b", "", None

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.running, self.ended = error, asyncio.Event(), False

    async def begin_term_after(self, term: int) -> int:
        return term + 1

    async def run(self) -> None:
        self.running.set()
        try:
            if self.error:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.ended = True

    async def release(self) -> None:
        pass


async def test_whoever_has_neither_is_done_at_once() -> None:
    await asyncio.wait_for(Neighbours().run(lambda _: None), 1)


async def test_changes_are_told_until_it_is_cancelled() -> None:
    source, lease = Source(("a",), ("a", "b")), Lease()
    told: list[tuple[str, ...]] = []
    neighbours = Neighbours(source, lease)
    await neighbours.wait_answered(0)
    running = asyncio.create_task(neighbours.run(told.append))
    await lease.running.wait()
    await asyncio.wait_for(neighbours.wait_answered(60), 1)
    running.cancel()
    await asyncio.wait([running])
    assert told == [("a",), ("a", "b")]
    assert source.closed
    assert lease.ended


@pytest.mark.parametrize("which", ["source", "lease"])
async def test_an_error_of_one_ends_both_and_is_raised_by_itself(which: str) -> None:
    error = InvalidArgument("no KUBECONFIG")
    source, lease = Source(error=error if which == "source" else None), Lease(error if which == "lease" else None)
    neighbours = Neighbours(source, lease)
    with pytest.raises(InvalidArgument, match="no KUBECONFIG"):
        await neighbours.run(lambda _: None)
    await asyncio.wait_for(neighbours.wait_answered(60), 1)
    assert source.closed
    assert lease.ended
