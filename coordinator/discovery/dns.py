"""Workers by the addresses of a name: a headless Service, a service of docker compose, any name with many records.

All of the system's resolver's answers count, but of one family only: a worker that has addresses of both would be two. The
resolver does not say how long an answer holds, so it is asked again after a fixed pause.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    from coordinator.discovery.target import DnsTarget

log = structlog.get_logger(__name__)

INTERVAL_S = 2.0
"""Pause between two questions."""
LOOKUP_S = 10.0
"""Longest that a question may take."""

_NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA)


class DnsSource:
    """The addresses of one name."""

    def __init__(self, target: DnsTarget, resolve: Callable[[str], Awaitable[Iterable[str]]] | None = None) -> None:
        """Ask nothing yet.

        Args:
            target: the name.
            resolve: gives a name's IP addresses or raises `OSError`; None: the system's resolver.

        """
        self._target = target
        self._resolve = resolve or _ask_system

    async def addresses(self) -> AsyncGenerator[tuple[str, ...]]:
        """See `WorkerSource.addresses`; a name that does not exist has no addresses."""
        known: tuple[str, ...] | None = None
        told = ""
        while True:
            found = known
            try:
                found = await self._ask()
                problem = "" if found else "it has no addresses"
            except OSError as error:
                problem = error.strerror or str(error) or f"no answer within {LOOKUP_S:g} s"
            if problem and problem != told:
                log.warning("no workers by this name", name=self._target.name, error=problem)
            told = problem
            if found is not None and found != known:
                known = found
                yield found
            await asyncio.sleep(INTERVAL_S)

    async def _ask(self) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(LOOKUP_S):
                return self._listed(await self._resolve(self._target.name))
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                return ()
            raise

    def _listed(self, found: Iterable[str]) -> tuple[str, ...]:
        addresses = sorted({ipaddress.ip_address(text.partition("%")[0]) for text in found}, key=lambda one: (one.version, one))
        family = [one for one in addresses if one.version == addresses[0].version]
        return tuple(show_address(str(one), self._target.port) for one in family)


def show_address(host: str, port: int) -> str:
    """Write an address as gRPC reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _ask_system(name: str) -> list[str]:
    answers = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answers]
