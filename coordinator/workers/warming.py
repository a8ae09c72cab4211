"""Spares keep the model's files in memory: they are asked for it whenever a mesh serves, and again and again while it does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from protos import rpc
from protos.errors import MeshError
from protos.shardworker_pb2 import WarmRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coordinator.fanout import Fanout
    from coordinator.planning.plan import MeshPlan
    from coordinator.workers.pool import WorkerPool

log = structlog.get_logger(__name__)

WARM_S = 15.0
"""Pause between two times that spares are asked, seconds."""


class SpareWarmer:
    """Asks the spares of one pool."""

    def __init__(self, pool: WorkerPool) -> None:
        """Ask nothing yet."""
        self._pool = pool
        self._task: asyncio.Task[None] | None = None
        # What spares said, as far as the log tells already; "" if they are warm.
        self._told: dict[str, str] = {}

    def start(self, plan: MeshPlan, directory: Path, fanout: Fanout) -> None:
        """Ask all workers but those of the mesh that serves, from now on, in place of any earlier mesh.

        Args:
            plan: whose files.
            directory: of the files, as the workers see it.
            fanout: of the mesh.

        """
        self.stop()
        self._task = asyncio.create_task(self._keep_warm(plan, directory, fanout))

    def stop(self) -> None:
        """Ask no more. Idempotent."""
        if self._task:
            self._task.cancel()

    async def _keep_warm(self, plan: MeshPlan, directory: Path, fanout: Fanout) -> None:
        while True:
            await self.warm(plan, directory, fanout.addresses)
            # What the system took back meanwhile is read again; spares may have come.
            await asyncio.sleep(WARM_S)

    async def warm(self, plan: MeshPlan, directory: Path, serving: Iterable[str]) -> None:
        """Have all workers but the serving ones bring the model's files into memory; who cannot is named in the log.

        Args:
            plan: whose files.
            directory: of the files, as the workers see it.
            serving: addresses of the mesh that serves.

        """
        request = WarmRequest(protocol_version=rpc.PROTOCOL_VERSION, directory=str(directory), files=plan.shards[0].files)
        spares = [client for address, client in self._pool.clients.items() if address not in frozenset(serving)]
        answers = await asyncio.gather(*(client.warm(request) for client in spares), return_exceptions=True)
        for client, answer in zip(spares, answers, strict=True):
            if self._pool.clients.get(client.address) is not client:
                # It went away meanwhile.
                continue
            if not isinstance(answer, MeshError) and isinstance(answer, BaseException):
                raise answer
            error = str(answer) if isinstance(answer, MeshError) else ""
            # Once, however often it is asked.
            if self._told.get(client.address) == error:
                continue
            self._told[client.address] = error
            if error:
                log.warning("spare cannot be warmed", worker=client.address, error=error)
            else:
                log.info("spare is warm", worker=client.address)
