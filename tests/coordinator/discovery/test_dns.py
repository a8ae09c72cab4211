"""Addresses of a name, through a resolver that answers as it is told."""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import aclosing

import pytest
from structlog.testing import capture_logs

from coordinator.discovery import dns
from coordinator.discovery.dns import DnsSource
from coordinator.discovery.target import DnsTarget

UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
BROKEN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class Resolver:
    """Gives each answer once, the last one for ever; counts the questions."""

    def __init__(self, *answers: Iterable[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.spent = asyncio.Event()

    async def __call__(self, name: str) -> Iterable[str]:
        self.asked.append(name)
        if len(self.answers) == 1:
            self.spent.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "INTERVAL_S", 0)


async def collect(resolver: Resolver, count: int) -> list[tuple[str, ...]]:
    async with asyncio.timeout(5), aclosing(DnsSource(DnsTarget("workers", 7001), resolver).addresses()) as addresses:
        return [await anext(addresses) for _ in range(count)]


async def test_all_addresses_are_given_whenever_they_change() -> None:
    resolver = Resolver(["10.0.0.2", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.10", "10.0.0.2", "10.0.0.2"])
    assert await collect(resolver, 2) == [("10.0.0.1:7001", "10.0.0.2:7001"), ("10.0.0.2:7001", "10.0.0.10:7001")]
    assert resolver.asked == ["workers"] * 3


async def test_ipv6_is_taken_where_there_is_nothing_else_so_that_no_worker_counts_twice() -> None:
    resolver = Resolver(["fd00::2", "fd00::1"], ["fd00::1", "10.0.0.1"])
    assert await collect(resolver, 2) == [("[fd00::1]:7001", "[fd00::2]:7001"), ("10.0.0.1:7001",)]


async def test_name_without_addresses_is_an_answer_and_a_resolver_that_fails_is_none() -> None:
    resolver = Resolver(UNKNOWN, ["10.0.0.1"], BROKEN, BROKEN, ["10.0.0.1"], BROKEN, ["10.0.0.2"], UNKNOWN)
    assert await collect(resolver, 4) == [(), ("10.0.0.1:7001",), ("10.0.0.2:7001",), ()]


async def test_trouble_is_logged_once_until_it_is_over() -> None:
    with capture_logs() as lines:
        await collect(Resolver(BROKEN, BROKEN, BROKEN, ["10.0.0.1"], BROKEN, UNKNOWN), 2)
    assert [line["error"] for line in lines] == [BROKEN.strerror, BROKEN.strerror, "it has no addresses"]
    assert {line["name"] for line in lines} == {"workers"}


async def test_resolver_that_hangs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "LOOKUP_S", 0.01)
    asked = 0

    async def resolve(_: str) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            await asyncio.Event().wait()
        return ["10.0.0.1"]

    async with asyncio.timeout(5), aclosing(DnsSource(DnsTarget("workers", 1), resolve).addresses()) as addresses:
        assert await anext(addresses) == ("10.0.0.1:1",)


async def test_the_systems_resolver_knows_this_host() -> None:
    async with asyncio.timeout(5), aclosing(DnsSource(DnsTarget("127.0.0.1", 1)).addresses()) as addresses:
        assert await anext(addresses) == ("127.0.0.1:1",)
