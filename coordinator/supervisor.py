"""Keeps the engine running on a full mesh: assembles one, and another when it breaks.

Requests survive the change: their journals are replayed on the new mesh. They are ended with an error only when no mesh can
be had for a while, or when step after step fails.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from coordinator.forward import Forward
from coordinator.head import Head
from protos.errors import MeshError, NotServing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coordinator.engine import Engine
    from coordinator.fanout import Fanout
    from coordinator.models.spec import ModelSpec
    from coordinator.resident import Resident
    from protos.tensor_pb2 import DType

log = structlog.get_logger(__name__)

MAX_FAILURES = 3
"""Meshes that may break in a row without a single step done, before the requests at hand are given up."""

RETRY_S = 0.5
"""Pause between attempts to assemble a mesh."""


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Engine and mesh, held together."""

    engine: Engine
    spec: ModelSpec
    resident: Resident
    wire: DType
    shard_vocabularies: tuple[int, ...]
    assemble: Callable[[], Awaitable[Fanout]]
    on_serving: Callable[[bool], Awaitable[None]]
    """Told whether a full mesh serves."""
    recovery_s: float
    """How long requests wait for another mesh, seconds."""

    async def run(self, fanout: Fanout) -> None:
        """Serve for ever, first on a mesh that was assembled already.

        Whatever else than a `MeshError` comes up is a defect: the requests at hand are ended before it is raised.
        """
        try:
            await self._serve(fanout)
        except Exception as error:
            log.exception("engine failed", error=repr(error))
            self.engine.refusal = NotServing("the engine failed; the coordinator's log has the details")
            self.engine.fail(MeshError("internal error; the coordinator's log has the details"))
            raise

    async def _serve(self, fanout: Fanout) -> None:
        failures = 0
        while True:
            await self.on_serving(True)
            steps_before = self.engine.statistics.steps
            try:
                await self.engine.run(
                    Forward(self.spec, self.resident, fanout, self.wire), Head(fanout, self.wire, self.shard_vocabularies)
                )
            except MeshError as error:
                log.warning("mesh is broken", epoch=fanout.epoch, error=str(error))
                failures = 1 if self.engine.statistics.steps > steps_before else failures + 1
                if failures >= MAX_FAILURES:
                    self.engine.fail(error)
                    failures = 0
                failure = error
            finally:
                fanout.close()
            await self.on_serving(False)
            self.engine.rewind()
            fanout = await self._recover(failure)
            log.info("mesh is whole again", epoch=fanout.epoch)

    async def _recover(self, failure: MeshError) -> Fanout:
        """Try until there is a mesh; after `recovery_s` end the requests that wait for it."""
        deadline = time.monotonic() + self.recovery_s
        given_up: NotServing | None = None
        while True:
            if self.recovery_s > 0 or given_up:
                try:
                    fanout = await self.assemble()
                except MeshError as error:
                    failure = error
                else:
                    # Another refusal, because the coordinator shuts down, stays.
                    if self.engine.refusal is given_up:
                        self.engine.refusal = None
                    return fanout
            if time.monotonic() >= deadline and not given_up:
                given_up = NotServing(f"no full mesh: {failure}")
                self.engine.refusal = self.engine.refusal or given_up
                self.engine.fail(given_up)
            await asyncio.sleep(RETRY_S)
