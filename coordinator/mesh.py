"""A full mesh, and how one is built: for a plan, sized by what the workers have, of sessions with all of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.config import WIRES
from coordinator.forward import Forward
from coordinator.head import Head
from coordinator.planning.capacity import kv_pages
from coordinator.planning.placement import place
from coordinator.planning.plan import PAGE_TOKENS
from coordinator.scheduler import Limits
from protos.errors import TopologyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coordinator.config import ServeSettings
    from coordinator.fanout import Fanout
    from coordinator.planning.plan import MeshPlan
    from coordinator.resident import Resident
    from coordinator.served_model import ServedModel
    from coordinator.workers.loading import LoadEvent
    from coordinator.workers.pool import WorkerPool
    from protos.errors import MeshError


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a mesh is built after."""

    plan: MeshPlan
    limits: Limits


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sessions with all shards of a plan, and the model's formula bound to them."""

    blueprint: Blueprint
    fanout: Fanout
    forward: Forward
    head: Head

    def close(self) -> None:
        """End all sessions. Idempotent."""
        self.fanout.close()


class MeshBuilder:
    """Builds meshes of one model on one pool of workers."""

    def __init__(
        self, pool: WorkerPool, model: ServedModel, settings: ServeSettings, on_progress: Callable[[LoadEvent], None]
    ) -> None:
        """Read and ask nothing yet.

        Args:
            pool: of workers.
            model: to be served.
            settings: say how large meshes may be.
            on_progress: called for each step of loading.

        """
        self._pool = pool
        self._model = model
        self._settings = settings
        self._on_progress = on_progress
        self._resident: Resident | None = None

    async def plan(self, num_shards: int) -> MeshPlan:
        """Cut the model into so many shards.

        Raises:
            ModelError: tensors are missing or of another shape.
            TopologyError: it cannot be cut into so many, or fewer workers are listed.

        """
        listed = len(self._settings.workers)
        if num_shards > listed > 0:
            raise TopologyError(f"{num_shards} shards need {num_shards} workers, {listed} are listed: ask for fewer")
        return await asyncio.to_thread(self._model.plan, num_shards, PAGE_TOKENS)

    def limits(self, num_pages: int) -> Limits:
        """What the settings say of a mesh with so many KV pages."""
        settings = self._settings
        return Limits(
            num_pages=num_pages,
            page_tokens=PAGE_TOKENS,
            max_rows=settings.max_rows,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
        )

    async def draw(self, plan: MeshPlan, least_tokens: int = 0, *, waits: bool = True) -> Blueprint:
        """Size a mesh by the memory that its workers have without the weights that they hold now.

        Args:
            plan: of the mesh.
            least_tokens: of KV cache, for requests that are there already.
            waits: whether workers that do not listen yet are waited for a little.

        Raises:
            OutOfMemory: the workers have too little, perhaps because of what they keep for the mesh that serves.
            TopologyError: they have too little even for the weights alone.
            MeshError: there are too few workers, or one that is needed cannot be used.

        """
        survey = await self._pool.survey(wait_for_ready=waits, enough=len(plan.shards))
        self._pool.require(survey, len(plan.shards))
        place(plan, survey.reports)
        num_pages = kv_pages(plan, survey.reports, PAGE_TOKENS, self._settings.kv_tokens)
        if num_pages * PAGE_TOKENS < least_tokens:
            num_pages = kv_pages(plan, survey.reports, PAGE_TOKENS, least_tokens)
        return Blueprint(plan, self.limits(num_pages))

    async def build(self, blueprint: Blueprint, beside: Sequence[str] = ()) -> Mesh:
        """Load the shards and open the sessions.

        Args:
            blueprint: of the mesh.
            beside: addresses of a mesh of another plan that serves on meanwhile.

        Raises:
            OutOfMemory: with `beside`: there is no room for both.
            MeshError: too few workers, or one of those needed refuses or dies.

        """
        if self._resident is None:
            self._resident = await asyncio.to_thread(self._model.resident)
        plan, wire = blueprint.plan, WIRES[self._settings.model.wire]
        fanout = await self._pool.assemble(plan, self._model.files, blueprint.limits.num_pages, self._on_progress, beside=beside)
        vocabularies = tuple(shard.vocabulary.end - shard.vocabulary.start for shard in plan.shards)
        return Mesh(blueprint, fanout, Forward(self._model.spec, self._resident, fanout, wire), Head(fanout, wire, vocabularies))

    async def tidy(self, plan: MeshPlan, serving: Sequence[str]) -> None:
        """Have workers let go of what nobody uses while a plan is served; see `WorkerPool.tidy`."""
        await self._pool.tidy(plan, self._model.files, serving)

    async def wait_changed(self, timeout_s: float) -> None:
        """Wait until workers come or go, but no longer than `timeout_s` seconds."""
        await self._pool.wait_changed(timeout_s)

    def blame(self, error: MeshError, addresses: Iterable[str]) -> None:
        """Tell which workers failed a mesh: they are passed over for a while."""
        self._pool.blame(error, addresses)
