"""Keeps the engine running on a full mesh: assembles one, proves it, and another when it breaks.

A mesh serves once a canary token came through it. It is broken when a step fails, when a session ends, whether or not anybody
asks for tokens, or when the canary of an idle mesh does not come back. Requests survive the change: their journals are replayed
on the new mesh. They are ended with an error only when no mesh can be had for a while; one that breaks mesh after mesh ends
alone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from coordinator.attempts import until_mesh
from coordinator.forward import Forward
from coordinator.head import Head
from coordinator.recovery import Recoveries, Recovery
from protos.errors import MeshError, NotServing, WrongResult
from protos.log import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from coordinator.engine import Engine
    from coordinator.fanout import Fanout
    from coordinator.models.spec import ModelSpec
    from coordinator.resident import Resident
    from protos.tensor_pb2 import DType

log = structlog.get_logger(__name__)

_MS = 1_000_000


@dataclass(slots=True)
class Supervisor:
    """Engine and mesh, held together."""

    engine: Engine
    spec: ModelSpec
    resident: Resident
    wire: DType
    shard_vocabularies: tuple[int, ...]
    assemble: Callable[[], Awaitable[Fanout]]
    wait_changed: Callable[[float], Awaitable[None]]
    """Waits until workers come or go, but no longer than so many seconds."""
    blame: Callable[[MeshError, Iterable[str]], None]
    """Told which workers failed a mesh."""
    on_serving: Callable[[Fanout | None], Awaitable[None]]
    """Told of the mesh that serves from now on, or that none does."""
    recovery_s: float
    """How long requests wait for another mesh, seconds."""
    recoveries: Recoveries = field(default_factory=Recoveries)
    # Workers of the last mesh that was right, by shard.
    _proven: tuple[str, ...] = ()
    _turn: int = 0

    async def start(self) -> Fanout:
        """Make the first mesh.

        Raises:
            MeshError: it cannot be had, or its canary does not come back.

        """
        fanout = await self.assemble()
        await self._prove(fanout)
        return fanout

    async def run(self, fanout: Fanout) -> None:
        """Serve for ever, first on the mesh that `start` gave.

        Whatever else than a `MeshError` comes up is a defect: the requests at hand are ended before it is raised.
        """
        try:
            while True:
                fanout = await self._recover(await self._serve(fanout))
        except Exception as error:
            log.error("engine failed", error=type(error).__name__, frames=frames(error))  # noqa: TRY400  # not its text
            self.engine.refusal = NotServing("the engine failed; the coordinator's log has the details")
            self.engine.fail(MeshError("internal error; the coordinator's log has the details"))
            raise

    async def _serve(self, fanout: Fanout) -> Recovery:
        """Serve until the mesh breaks; then begin to recover."""
        await self.on_serving(fanout)
        try:
            error = await self._run(fanout)
        finally:
            fanout.close()
        started_ns = self.engine.step_started_ns
        recovery = Recovery(str(error), detect_ns=time.monotonic_ns() - started_ns if started_ns else 0)
        self.recoveries.begin(error.reason, recovery)
        self.blame(error, [fanout.addresses[shard] for shard in error.shards])
        log.warning("mesh is broken", epoch=fanout.epoch, reason=error.reason, error=str(error))
        await self.on_serving(None)
        self.engine.interrupt(error, when_resumed=recovery.note_resumed)
        return recovery

    async def _run(self, fanout: Fanout) -> MeshError:
        """Run the engine until it fails, or a session ends under it."""
        tasks = [asyncio.ensure_future(self.engine.run(*self._model(fanout))), asyncio.ensure_future(fanout.watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # The step knows better than the session what went wrong.
            error = next(task.exception() for task in tasks if task.done())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(error, MeshError):
            return error
        raise error or ValueError("the engine ended")

    async def _recover(self, recovery: Recovery) -> Fanout:
        """Try until there is a mesh that is right; after `recovery_s` end the requests that wait for it."""
        started_ns = time.monotonic_ns()
        attempts = asyncio.ensure_future(until_mesh(lambda: self._attempt(recovery, started_ns), self.wait_changed))
        try:
            if self.recovery_s:
                await asyncio.wait([attempts], timeout=self.recovery_s)
            given_up: NotServing | None = None
            if not attempts.done():
                given_up = NotServing(f"no full mesh: {recovery.obstacle or recovery.failure}")
                self.engine.refusal = self.engine.refusal or given_up
                self.engine.fail(given_up)
            fanout = await attempts
        finally:
            attempts.cancel()
        # Another refusal, because the coordinator shuts down, stays.
        if given_up and self.engine.refusal is given_up:
            self.engine.refusal = None
        self.recoveries.count += 1
        recovery.note_whole()
        log.info(
            "mesh is whole again",
            epoch=fanout.epoch,
            workers=fanout.addresses,
            detect_ms=recovery.detect_ns // _MS,
            assemble_ms=recovery.assemble_ns // _MS,
            canary_ms=recovery.canary_ns // _MS,
        )
        return fanout

    async def _attempt(self, recovery: Recovery, started_ns: int) -> Fanout:
        try:
            fanout = await self.assemble()
            recovery.assemble_ns = time.monotonic_ns() - started_ns
            recovery.canary_ns = await self._prove(fanout)
        except MeshError as error:
            recovery.obstacle = str(error)
            raise
        return fanout

    async def _prove(self, fanout: Fanout) -> int:
        """Send the canary through a new mesh, which is closed if that fails; give nanoseconds."""
        started_ns = time.monotonic_ns()
        try:
            await self.engine.prove(*self._model(fanout))
        except BaseException as error:
            fanout.close()
            if isinstance(error, MeshError):
                self.blame(error, self._culprits(fanout, error))
            raise
        self._proven = fanout.addresses
        return time.monotonic_ns() - started_ns

    def _culprits(self, fanout: Fanout, error: MeshError) -> list[str]:
        if error.shards or not isinstance(error, WrongResult):
            return [fanout.addresses[shard] for shard in error.shards]
        # All answered soundly, and yet it is not the model: whoever was not there when it was right holds something else.
        if newcomers := [address for address in fanout.addresses if address not in self._proven]:
            return newcomers
        # One of them has changed. Each is doubted in turn, so that with a spare the one is passed over sooner or later.
        self._turn += 1
        return [fanout.addresses[self._turn % len(fanout.addresses)]]

    def _model(self, fanout: Fanout) -> tuple[Forward, Head]:
        return Forward(self.spec, self.resident, fanout, self.wire), Head(fanout, self.wire, self.shard_vocabularies)
