"""The workers that there are: a client for each, and what they say of themselves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from coordinator.planning.placement import WorkerReport
from coordinator.workers.client import WorkerClient
from protos import rpc
from protos.errors import MeshError, ProtocolMismatch, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any

    from protos.certificates import Certificates
    from protos.shardworker_pb2 import DescribeResponse

log = structlog.get_logger(__name__)

SETTLE_S = 0.5
"""Once enough workers answered, the others have so long to be known too."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the workers said of themselves."""

    reports: tuple[WorkerReport, ...]
    failures: dict[str, MeshError]
    """Why the others cannot be used, by address."""


class Roster:
    """Clients of all workers, serving ones and spares alike; workers may come and go."""

    def __init__(self, addresses: Sequence[str], certificates: Certificates | None) -> None:
        """Make the clients; nothing is sent yet.

        Args:
            addresses: distinct, each checked by `protos.rpc.check_address`.
            certificates: for TLS to the workers reached by TCP; None for plaintext.

        """
        self._certificates = certificates
        self.clients = {address: WorkerClient(address, certificates) for address in addresses}
        # Of the mesh: kept open when they leave `clients`, for sessions and loads go on.
        self.engaged: dict[str, WorkerClient] = {}
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()

    def follow(self, addresses: Sequence[str]) -> None:
        """Take another set of workers: newcomers are asked from now on, those that went away no more."""
        known = self.engaged | self.clients
        came = [address for address in addresses if address not in self.clients]
        gone = [address for address in self.clients if address not in addresses]
        if not came and not gone:
            return
        log.info("workers changed", workers=len(addresses), came=came, gone=gone)
        self.clients = {address: known.get(address) or WorkerClient(address, self._certificates) for address in addresses}
        for address in gone:
            if address not in self.engaged:
                self._close(known[address])
        self._changed.set()
        self._changed = asyncio.Event()

    def engage(self, addresses: Sequence[str]) -> None:
        """Keep the channels to these workers, known at this moment, until the next call, whether or not they go away."""
        before, known = self.engaged, self.engaged | self.clients
        self.engaged = {address: known[address] for address in addresses}
        for address, client in before.items():
            if address not in self.engaged and self.clients.get(address) is not client:
                self._close(client)

    async def wait_changed(self, timeout_s: float) -> None:
        """Wait until workers come or go, but no longer than `timeout_s` seconds."""
        await asyncio.wait([changed := asyncio.ensure_future(self._changed.wait())], timeout=timeout_s)
        changed.cancel()

    async def survey(self, *, wait_for_ready: bool, enough: int | None = None) -> Survey:
        """Ask all workers what they are and hold.

        Args:
            wait_for_ready: whether workers that do not listen yet are waited for, until a deadline or until workers come or go.
            enough: so many answers will do, and whoever has not answered `SETTLE_S` seconds later is left out; None: all.

        """
        asked = {client: asyncio.ensure_future(_ask(client, wait_for_ready=wait_for_ready)) for client in self.clients.values()}
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await _enough(asked.values(), changed, len(asked) if enough is None else enough)
            reports: list[WorkerReport] = []
            failures: dict[str, MeshError] = {}
            for client, answer in asked.items():
                address = client.address
                if self.clients.get(address) is not client:
                    # It went away meanwhile.
                    continue
                if not answer.done() or answer.cancelled():
                    failures[address] = WorkerLost(f"worker {address} has not answered yet, and others have")
                elif isinstance(error := answer.exception(), MeshError):
                    failures[address] = error
                else:
                    reports.append(WorkerReport(address, answer.result()))
            return Survey(tuple(reports), failures)
        finally:
            for task in (changed, *asked.values()):
                task.cancel()

    async def close(self) -> None:
        """Close all channels."""
        for client in {*self.clients.values(), *self.engaged.values()}:
            self._close(client)
        await asyncio.gather(*self._closing)

    def _close(self, client: WorkerClient) -> None:
        task = asyncio.ensure_future(client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _ask(client: WorkerClient, *, wait_for_ready: bool) -> DescribeResponse:
    answer = await client.describe(wait_for_ready=wait_for_ready)
    if answer.protocol_version != rpc.PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"worker {client.address} (shardmesh {answer.version}) speaks protocol {answer.protocol_version}, this "
            f"coordinator {rpc.PROTOCOL_VERSION}: run the same version on both"
        )
    return answer


async def _enough(asked: Collection[asyncio.Future[Any]], changed: asyncio.Future[Any], wanted: int) -> None:
    """Wait for all, or for so many that succeed and `SETTLE_S` more, or until workers come or go."""
    pending = set(asked)
    while pending and not changed.done() and sum(map(_succeeded, asked)) < wanted:
        await asyncio.wait({*pending, changed}, return_when=asyncio.FIRST_COMPLETED)
        pending = {one for one in asked if not one.done()}
    if pending:
        await asyncio.wait(pending, timeout=SETTLE_S)


def _succeeded(answer: asyncio.Future[Any]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None
