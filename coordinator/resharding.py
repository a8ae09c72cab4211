"""The number of shards changes while the mesh serves: the next mesh is made beside the present one, and takes its place.

It is loaded, opened and proven while the present one goes on. Workers that take part in both hold both plans for as long. Where
their memory has no room for that, the present mesh is given up first, and requests wait. Either way they are replayed on the next
mesh, and go on with the same tokens.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from coordinator.attempts import until_mesh
from protos.errors import MeshError, OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.discovery.interfaces import PlanLease
    from coordinator.engine import Engine
    from coordinator.mesh import Blueprint, Mesh, MeshBuilder
    from coordinator.planning.plan import MeshPlan
    from coordinator.proof import Prover
    from coordinator.sequence import SequenceId

log = structlog.get_logger(__name__)

SWEEPS = 3
SWEEP_S = 5.0
"""So often, with such pauses, workers are asked to let go of what nobody uses after a change: other coordinators change later."""

_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class NextMesh:
    """It has proven itself, and no step has seen it yet."""

    mesh: Mesh
    left: SequenceId
    """The canary's, of which its workers hold keys and values."""


@dataclass(slots=True)
class Resharding:
    """Which plan is served, and which is wanted."""

    engine: Engine
    builder: MeshBuilder
    prover: Prover
    lease: PlanLease | None
    """By which coordinators tell each other what is wanted; None: this one has its workers for itself."""
    present: MeshPlan
    """Of the mesh that serves, or served last."""
    wanted: MeshPlan
    """The present one, unless another is asked for."""
    obstacle: str = ""
    """Why the wanted mesh could not be made yet, for people; empty if nothing is in its way."""
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    # Whether the present mesh was given up for the wanted one already: once is enough.
    _gave_way: bool = False
    _sweeps_left: int = 0

    async def ask(self, num_shards: int) -> None:
        """Want another number of shards, here and in all coordinators of the same lease.

        Raises:
            TopologyError: the model cannot be cut into so many, or the workers are too few.
            NotServing: the lease cannot be written.

        """
        plan = await self.builder.plan(num_shards)
        if self.lease:
            await self.lease.ask_shards(num_shards)
        self.want(plan)

    async def follow(self) -> None:
        """Want what the lease says, whenever it says something else."""
        known: int | None = None
        while self.lease:
            known = await self.lease.wait_shards(known)
            if known is not None:
                try:
                    self.want(await self.builder.plan(known))
                except MeshError as error:
                    log.error("what the lease wants cannot be", lease=self.lease.name, shards=known, error=str(error))  # noqa: TRY400
                    self.obstacle = str(error)

    def want(self, plan: MeshPlan) -> None:
        """Have the mesh cut by another plan, from now on."""
        if plan.digest == self.wanted.digest:
            if self.wanted is self.present:
                # Of a number that could not be.
                self.obstacle = ""
            return
        log.info("another number of shards is wanted", shards=len(plan.shards), present=len(self.present.shards))
        self.wanted = self.present if plan.digest == self.present.digest else plan
        self.obstacle, self._gave_way, self._sweeps_left = "", False, SWEEPS
        self._asked.set()

    async def draw(self, plan: MeshPlan, *, waits: bool) -> Blueprint:
        """Size a mesh for all requests that are there; those that come from now on must fit as well, until it serves.

        Args:
            plan: of the mesh.
            waits: see `MeshBuilder.draw`.

        Raises:
            MeshError: see there.

        """
        while True:
            blueprint = await self.builder.draw(plan, self.engine.scheduler.needed_tokens, waits=waits)
            # One may have come meanwhile.
            if self.engine.expect(blueprint.limits):
                return blueprint

    def note_served(self, plan: MeshPlan) -> None:
        """Take note of the plan whose mesh serves."""
        self.present = plan
        if plan.digest == self.wanted.digest:
            # It may have been asked for again meanwhile.
            self.wanted, self.obstacle = plan, ""

    async def next_mesh(self, serving: Sequence[str]) -> NextMesh | None:
        """Wait until another plan is wanted, and make its mesh; None if the present one has to give way first.

        Args:
            serving: addresses of the present mesh.

        """
        while True:
            self._asked.clear()
            asked = asyncio.ensure_future(self._asked.wait())
            making = asyncio.ensure_future(self._make_wanted(serving))
            taken = False
            try:
                await asyncio.wait([asked, making], return_when=asyncio.FIRST_COMPLETED)
                if taken := not asked.done():
                    return making.result()
            finally:
                asked.cancel()
                making.cancel()
                if not taken:
                    await _discard(making)
                    self.engine.expect(None)

    async def _make_wanted(self, serving: Sequence[str]) -> NextMesh | None:
        if self.wanted is self.present:
            await self._sweep(serving)
            # Until another plan is wanted.
            await asyncio.Event().wait()
        return await until_mesh(lambda: self._try(serving), self.builder.wait_changed, patient=True)

    async def _sweep(self, serving: Sequence[str]) -> None:
        while self._sweeps_left:
            await asyncio.sleep(SWEEP_S)
            await self.builder.tidy(self.present, serving)
            self._sweeps_left -= 1

    async def _try(self, serving: Sequence[str]) -> NextMesh | None:
        try:
            return await self._make(serving)
        except MeshError as error:
            self.engine.expect(None)
            self.obstacle = str(error)
            raise

    async def _make(self, serving: Sequence[str]) -> NextMesh | None:
        plan, started_ns = self.wanted, time.monotonic_ns()
        try:
            blueprint = await self.draw(plan, waits=True)
            mesh = await self.builder.build(blueprint, beside=serving)
        except OutOfMemory as error:
            # Where even the emptied workers have too little for the weights it is a TopologyError, and nobody gives way.
            if self._gave_way:
                raise
            self._gave_way = True
            log.warning("the mesh that serves gives way to the next one", reason=error.reason, error=str(error))
            return None
        built_ns = time.monotonic_ns()
        left = await self.prover.prove(mesh)
        log.info(
            "next mesh is ready",
            shards=len(plan.shards),
            workers=mesh.fanout.addresses,
            assemble_ms=(built_ns - started_ns) // _MS,
            canary_ms=(time.monotonic_ns() - built_ns) // _MS,
        )
        return NextMesh(mesh, left)


async def _discard(making: asyncio.Future[NextMesh | None]) -> None:
    """Close a mesh that was made although nobody wants it any more."""
    await asyncio.wait([making])
    if not making.cancelled() and not making.exception() and (found := making.result()):
        found.mesh.close()
