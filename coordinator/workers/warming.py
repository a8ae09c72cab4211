"""Spares keep the model's files in memory: they are asked for it whenever a mesh serves, and again and again while it does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.fanout import Fanout
    from coordinator.planning.plan import MeshPlan
    from coordinator.workers.pool import WorkerPool

WARM_S = 15.0
"""Pause between two times that spares are asked, seconds."""


class SpareWarmer:
    """Asks the spares of one pool."""

    def __init__(self, pool: WorkerPool) -> None:
        """Ask nothing yet."""
        self._pool = pool
        self._task: asyncio.Task[None] | None = None

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
            await self._pool.warm(plan, directory, fanout.addresses)
            # What the system took back meanwhile is read again; spares may have come.
            await asyncio.sleep(WARM_S)
