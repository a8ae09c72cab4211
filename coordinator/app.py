"""The composition root: builds a coordinator from its settings, starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.access import open_access
from coordinator.attempts import heals_by_itself, until_mesh
from coordinator.config import WIRES
from coordinator.discovery.neighbours import Neighbours
from coordinator.engine import Engine
from coordinator.mesh import MeshBuilder
from coordinator.planning.capacity import check_rows
from coordinator.planning.placement import default_shards
from coordinator.proof import Prover
from coordinator.recovery import Recoveries
from coordinator.resharding import Resharding
from coordinator.service import GenerationService
from coordinator.status import MeshStatus
from coordinator.supervisor import Supervisor
from coordinator.telemetry import Telemetry
from coordinator.workers.pool import WorkerPool
from coordinator.workers.warming import SpareWarmer
from protos import generation_pb2, generation_pb2_grpc, rpc
from protos.errors import NotServing
from protos.health import HealthListener, listen_for_probes
from protos.interceptors import ErrorInterceptor
from protos.listen import bind, unbind
from protos.tensors import num_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.config import ServeSettings
    from coordinator.discovery.interfaces import PlanLease
    from coordinator.mesh import Mesh
    from coordinator.rounds import RoundObserver
    from coordinator.served_model import ServedModel
    from coordinator.workers.loading import LoadEvent

log = structlog.get_logger(__name__)

FAREWELL_S = 2.0
"""Longest that ended streams may take to hear of it, seconds."""

ANSWER_S = 5.0
"""Longest that whoever finds workers may take for a first answer before it is said that there are none, seconds."""

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


class Coordinator:
    """A running coordinator."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel,
        on_progress: Callable[[LoadEvent], None],
        observer: RoundObserver | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Build what needs no network; `start` does the rest."""
        self.settings = settings
        self.model = model
        self.address = settings.listen
        self._on_progress = on_progress
        self._access = open_access(settings)
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(self._access.guard)],
            options=rpc.server_options(max_send_bytes=rpc.MAX_CALLER_BYTES, max_receive_bytes=rpc.MAX_CALLER_BYTES),
        )
        self._health = health.aio.HealthServicer()
        self._telemetry = Telemetry(settings, model, lambda: self._status, observer)
        self._neighbours = neighbours or Neighbours.open(settings.discovery.discover, settings.discovery.lease)
        self._pool = WorkerPool(
            settings.workers,
            round_timeout_s=settings.round_timeout_s,
            lease_s=rpc.lease_s(settings.round_timeout_s, settings.max_rows),
            observer=self._telemetry.rounds,
            certificates=self._access.certificates,
            lease=self._neighbours.lease,
            supplies=settings.weights == "stream",
        )
        self._probes: HealthListener | None = None
        self._bound = False
        self._status: MeshStatus | None = None
        self._serving: asyncio.Task[None] | None = None
        self._warmer = SpareWarmer(self._pool)
        self._looking: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        settings: ServeSettings,
        model: ServedModel,
        on_progress: Callable[[LoadEvent], None],
        observer: RoundObserver | None = None,
        neighbours: Neighbours | None = None,
    ) -> Self:
        """Listen, load the workers, serve.

        Args:
            settings: of the service.
            model: to serve.
            on_progress: called for each step of loading.
            observer: told of each round.
            neighbours: where workers are found, and with whom they are shared; None: as the settings say.

        Raises:
            MeshError: the address is taken, the model cannot be cut like this, or no full mesh can be had.

        """
        coordinator = cls(settings, model, on_progress, observer, neighbours)
        try:
            await coordinator._start()
        except BaseException:
            await coordinator.stop(grace_s=0)
            raise
        return coordinator

    @property
    def metrics_url(self) -> str | None:
        """Where metrics are served; None if they are not."""
        return self._telemetry.metrics_url

    async def wait(self) -> None:
        """Serve until something unforeseen breaks, and raise that; cancelling it stops nothing."""
        tasks = [task for task in (self._serving, self._looking, self._following) if task]
        while running := [task for task in tasks if not task.done()]:
            for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                task.result()

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let the running ones finish within `grace_s` seconds, then stop. Idempotent.

        Workers are looked for and plans handed out to the end: workers may be replaced meanwhile, and nobody else need be there.
        """
        await self._health.enter_graceful_shutdown()
        if self._status and self._serving and not self._serving.done():
            engine = self._status.engine
            engine.refusal = NotServing("the coordinator is shutting down")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await engine.wait_idle()
            engine.fail(engine.refusal)
            self._serving.cancel()
            await asyncio.wait([self._serving])
        if self._following:
            self._following.cancel()
        self._warmer.stop()
        await self._leave()
        # A little more, so that every stream gets its terminal status.
        await self._server.stop(grace=FAREWELL_S if grace_s else 0)
        if self._bound:
            unbind(self.address)
            self._bound = False
        if self._probes:
            await self._probes.stop()
            self._probes = None
        await self._telemetry.stop()
        await self._pool.close()

    async def _leave(self) -> None:
        """Look for workers no more, and let another coordinator hand out plans."""
        looking, self._looking = self._looking, None
        if looking:
            looking.cancel()
            await asyncio.wait([looking])
            if self._neighbours.lease:
                await self._neighbours.lease.release()

    async def _start(self) -> None:
        settings = self.settings
        self.address = await bind(self._server, settings.listen, self._access.listener)
        self._bound = True
        await self._telemetry.listen()
        self._looking = asyncio.create_task(self._neighbours.run(self._pool.follow))
        check_rows(settings.max_rows, self.model.spec.hidden, num_bytes(WIRES[settings.model.wire], (1, self.model.spec.hidden)))
        builder = MeshBuilder(self._pool, self.model, settings, self._on_progress)
        # Pages are counted when the workers have said how much memory they have.
        observer = self._telemetry.observer
        engine = Engine(builder.limits(num_pages=1), self.model.spec.vocabulary, self.model.spec.context, observer)
        engine.refusal = NotServing("the workers are loading")
        recoveries = Recoveries(on_end=observer.recovery_ended)
        plan = await builder.plan(await self._choose_shards())
        prover = Prover(engine, builder)
        resharding = Resharding(engine, builder, prover, self._neighbours.lease, present=plan, wanted=plan)
        self._status = MeshStatus(self._pool, resharding, engine, recoveries, metrics=self._telemetry.metrics)
        await self._listen()
        supervisor = Supervisor(
            engine=engine,
            builder=builder,
            prover=prover,
            resharding=resharding,
            on_serving=self._note_serving,
            recovery_s=settings.recovery_s,
            recoveries=recoveries,
        )
        self._following = asyncio.create_task(resharding.follow())
        await self._neighbours.wait_answered(ANSWER_S)
        mesh = await until_mesh(
            supervisor.start,
            self._wait_changed,
            timeout_s=settings.discovery.startup_s,
            heals=lambda error: self._is_shared or heals_by_itself(error),
        )
        engine.refusal = None
        self._serving = asyncio.create_task(supervisor.run(mesh))

    @property
    def _is_shared(self) -> bool:
        """Whether others than who started this coordinator may change the workers."""
        return bool(self._neighbours.source or self._neighbours.lease)

    async def _choose_shards(self) -> int:
        settings, lease = self.settings, self._neighbours.lease
        if lease and self._looking:
            # What it says wins, because all others do what it says.
            asked = asyncio.ensure_future(self._shards_of(lease))
            timeout_s = ANSWER_S if settings.shards else settings.discovery.startup_s
            await asyncio.wait([asked, self._looking], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            asked.cancel()
            if self._looking.done():
                self._looking.result()
            if not settings.shards:
                raise NotServing(f"Lease {lease.name} does not say how many shards are wanted: annotate it, or give --shards")
        if settings.shards:
            return settings.shards
        # Not of those that answer by now: the mesh would be as large as who started first allows.
        return default_shards(len(settings.workers), self.model.spec)

    async def _shards_of(self, lease: PlanLease) -> int:
        """Give what the lease says, or else --shards; without either wait until the lease says it."""
        await lease.wait_seen()
        shards = lease.shards or self.settings.shards
        if not shards:
            log.info("waiting for the lease to say how many shards are wanted", lease=lease.name)
        while not shards:
            shards = await lease.wait_shards(None)
        return shards

    async def _wait_changed(self, timeout_s: float) -> None:
        if self._looking and self._looking.done():
            self._looking.result()
        await self._pool.wait_changed(timeout_s)

    async def _listen(self) -> None:
        if self._status is None:
            raise ValueError("listening before the status exists")
        service = GenerationService(self.model, self._status.engine, self._status, self._status.resharding.ask)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self.settings.health_listen:
            self._probes = await listen_for_probes(self.settings.health_listen, self._health)
        await self._server.start()

    async def _note_serving(self, mesh: Mesh | None) -> None:
        if self._status is None:
            raise ValueError("a mesh that serves before its plan")
        fanout = self._status.fanout = mesh.fanout if mesh else None
        state = health_pb2.HealthCheckResponse.SERVING if mesh else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, state)
        if mesh and fanout:
            num_pages = mesh.blueprint.limits.num_pages
            log.info("mesh serves", epoch=fanout.epoch, workers=fanout.addresses, kv_pages=num_pages)
            if self.settings.warm_spares and self.model.files:
                self._warmer.start(mesh.blueprint.plan, self.model.files, fanout)
