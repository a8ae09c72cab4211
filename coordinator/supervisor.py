"""Keeps the engine running on a full mesh: has one built, proves it, and another when it breaks or is to be cut anew.

A mesh serves once a canary token came through it. It is broken when a step fails, when a session ends, whether or not anybody
asks for tokens, or when the canary of an idle mesh does not come back. Requests survive the change: their journals are replayed
on the next mesh. They are ended with an error only when no mesh can be had for a while; one that breaks mesh after mesh ends
alone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from coordinator.attempts import until_mesh
from coordinator.recovery import Recoveries, Recovery
from coordinator.resharding import NextMesh
from protos.errors import MeshError, NotServing
from protos.log import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coordinator.engine import Engine
    from coordinator.mesh import Blueprint, Mesh, MeshBuilder
    from coordinator.planning.plan import MeshPlan
    from coordinator.proof import Prover
    from coordinator.resharding import Resharding
    from coordinator.sequence import SequenceId

log = structlog.get_logger(__name__)

_MS = 1_000_000


@dataclass(slots=True)
class Supervisor:
    """Engine and mesh, held together."""

    engine: Engine
    builder: MeshBuilder
    prover: Prover
    resharding: Resharding
    on_serving: Callable[[Mesh | None], Awaitable[None]]
    """Told of the mesh that serves from now on, or that none does."""
    recovery_s: float
    """How long requests wait for another mesh when theirs broke, seconds."""
    recoveries: Recoveries = field(default_factory=Recoveries)
    # Of the mesh that serves, or served last.
    _blueprint: Blueprint | None = None

    async def start(self) -> Mesh:
        """Make the first mesh.

        Raises:
            MeshError: it cannot be had, or its canary does not come back.

        """
        mesh = await self._build(self.resharding.wanted)
        self._take(mesh, await self.prover.prove(mesh))
        return mesh

    async def run(self, mesh: Mesh) -> None:
        """Serve for ever, first on the mesh that `start` gave.

        Whatever else than a `MeshError` comes up is a defect: the requests at hand are ended before it is raised.
        """
        try:
            while True:
                ended = await self._serve(mesh)
                mesh = ended if not isinstance(ended, Recovery) else await self._recover(ended)
        except Exception as error:
            log.error("engine failed", error=type(error).__name__, frames=frames(error))  # noqa: TRY400  # not its text
            self.engine.refusal = NotServing("the engine failed; the coordinator's log has the details")
            self.engine.fail(MeshError("internal error; the coordinator's log has the details"))
            raise

    async def _serve(self, mesh: Mesh) -> Mesh | Recovery:
        """Serve until the mesh breaks or gives way, and begin to recover; or until another one takes its place."""
        await self.on_serving(mesh)
        try:
            ended = await self._run(mesh)
        finally:
            mesh.close()
        error = ended if isinstance(ended, MeshError) else None
        started_ns = self.engine.step_started_ns
        recovery = Recovery(str(error or ""), detect_ns=time.monotonic_ns() - started_ns if started_ns else 0)
        self.recoveries.begin(error.reason if error else "", recovery)
        if isinstance(ended, NextMesh):
            return self._change(ended, recovery)
        if error:
            self.builder.blame(error, [mesh.fanout.addresses[shard] for shard in error.shards])
            log.warning("mesh is broken", epoch=mesh.fanout.epoch, reason=error.reason, error=str(error))
        await self.on_serving(None)
        self.engine.interrupt(error, when_resumed=recovery.note_resumed)
        return recovery

    def _change(self, found: NextMesh, recovery: Recovery) -> Mesh:
        """Go over to a mesh that was made beside the one that served."""
        mesh = found.mesh
        self.engine.interrupt(None, when_resumed=recovery.note_resumed)
        recovery.note_whole()
        self._take(mesh, found.left)
        self.recoveries.reshards += 1
        log.info("mesh is cut anew", epoch=mesh.fanout.epoch, workers=mesh.fanout.addresses)
        return mesh

    async def _run(self, mesh: Mesh) -> MeshError | NextMesh | None:
        """Run the engine until it fails, a session ends under it, or another mesh takes its place; None: it has no room."""
        change = asyncio.ensure_future(self.resharding.next_mesh(mesh.fanout.addresses))
        steps = asyncio.ensure_future(self.engine.run(mesh.forward, mesh.head))
        sessions = asyncio.ensure_future(mesh.fanout.watch())
        try:
            await asyncio.wait([steps, sessions, change], return_when=asyncio.FIRST_COMPLETED)
            # The step knows better than the session what went wrong.
            error = next((task.exception() for task in (steps, sessions) if task.done()), None)
        finally:
            for task in (steps, sessions, change):
                task.cancel()
            await asyncio.gather(steps, sessions, change, return_exceptions=True)
        if error is not None and not isinstance(error, MeshError):
            raise error
        # A mesh that stands ready is better than any recovery.
        if not change.cancelled() and (found := change.result()):
            return found
        return error

    async def _recover(self, recovery: Recovery) -> Mesh:
        """Try until there is a mesh that is right; once patience is over end the requests that wait for it."""
        started_ns = time.monotonic_ns()
        attempts = asyncio.ensure_future(until_mesh(lambda: self._attempt(recovery, started_ns), self.builder.wait_changed))
        patience = asyncio.ensure_future(self._patience(recovery))
        try:
            if self.recovery_s or not recovery.failure:
                await asyncio.wait([attempts, patience], return_when=asyncio.FIRST_COMPLETED)
            given_up: NotServing | None = None
            if not attempts.done():
                given_up = NotServing(f"no full mesh: {recovery.obstacle or recovery.failure or 'it is being cut anew'}")
                self.engine.refusal = self.engine.refusal or given_up
                self.engine.fail(given_up)
            mesh = await attempts
        finally:
            attempts.cancel()
            patience.cancel()
        # Another refusal, because the coordinator shuts down, stays.
        if given_up and self.engine.refusal is given_up:
            self.engine.refusal = None
        if recovery.failure:
            self.recoveries.count += 1
        recovery.note_whole()
        log.info(
            "mesh is whole again",
            epoch=mesh.fanout.epoch,
            workers=mesh.fanout.addresses,
            detect_ms=recovery.detect_ns // _MS,
            assemble_ms=recovery.assemble_ns // _MS,
            canary_ms=recovery.canary_ns // _MS,
        )
        return mesh

    async def _patience(self, recovery: Recovery) -> None:
        """Wait as long as requests do: from a failure on; a mesh that gave way may take its time, as long as nothing fails."""
        if not recovery.failure:
            await recovery.obstructed.wait()
        await asyncio.sleep(self.recovery_s)

    async def _attempt(self, recovery: Recovery, started_ns: int) -> Mesh:
        """Make once more the mesh that was there, of which workers hold most, or else the one that is wanted.

        Where the one that was there gave way, the other way round.
        """
        plans = [self.resharding.present, self.resharding.wanted]
        if not recovery.failure:
            plans.reverse()
        try:
            try:
                return await self._make(plans[0], recovery, started_ns)
            except MeshError as error:
                if plans[1] is plans[0]:
                    raise
                recovery.note_obstacle(error)
                if plans[0] is self.resharding.wanted:
                    self.resharding.obstacle = str(error)
                return await self._make(plans[1], recovery, started_ns)
        except MeshError as error:
            recovery.note_obstacle(error)
            raise

    async def _make(self, plan: MeshPlan, recovery: Recovery, started_ns: int) -> Mesh:
        mesh = await self._build(plan)
        built_ns = time.monotonic_ns()
        recovery.assemble_ns = built_ns - started_ns
        left = await self.prover.prove(mesh)
        recovery.canary_ns = time.monotonic_ns() - built_ns
        if plan is not self.resharding.present:
            self.recoveries.reshards += 1
        self._take(mesh, left)
        return mesh

    async def _build(self, plan: MeshPlan) -> Mesh:
        # Of the mesh that was there the size is known, and every request fits.
        if self._blueprint and plan is self._blueprint.plan:
            return await self.builder.build(self._blueprint)
        # Of workers that are away for now, those of the mesh that was there are fewer.
        blueprint = await self.resharding.draw(plan, waits=self._blueprint is None)
        try:
            return await self.builder.build(blueprint)
        except BaseException:
            self.engine.expect(None)
            raise

    def _take(self, mesh: Mesh, left: SequenceId) -> None:
        """Let the engine go on with a mesh, once it does no steps on another."""
        self._blueprint = mesh.blueprint
        self.engine.move(mesh.blueprint.limits, left)
        self.resharding.note_served(mesh.blueprint.plan)
