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
from coordinator.planning.capacity import check_rows, kv_pages
from coordinator.planning.placement import default_shards
from coordinator.recovery import Recoveries
from coordinator.scheduler import Limits
from coordinator.service import GenerationService
from coordinator.status import MeshStatus
from coordinator.supervisor import Supervisor
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
    from pathlib import Path

    from coordinator.config import ServeSettings
    from coordinator.exposition import Exporter
    from coordinator.fanout import Fanout
    from coordinator.planning.plan import MeshPlan
    from coordinator.rounds import RoundObserver
    from coordinator.served_model import ServedModel
    from coordinator.workers.loading import LoadEvent

log = structlog.get_logger(__name__)

PAGE_TOKENS = 16
"""Tokens of a KV page: small enough to waste little on short sequences."""

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
        self._exporter: Exporter | None = None
        if settings.metrics_listen:
            # Who serves no metrics does not wait for their library.
            from coordinator.exposition import Exporter  # noqa: PLC0415

            self._exporter = Exporter(model, lambda: self._status)
            observer = observer or self._exporter.metrics.round_answered
        self._neighbours = neighbours or Neighbours.open(settings.discovery.discover, settings.discovery.lease)
        self._pool = WorkerPool(
            settings.workers,
            round_timeout_s=settings.round_timeout_s,
            lease_s=rpc.lease_s(settings.round_timeout_s, settings.max_rows),
            observer=observer,
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
        return self._exporter.url if self._exporter else None

    async def wait(self) -> None:
        """Serve until something unforeseen breaks, and raise that; cancelling it stops nothing."""
        tasks = [task for task in (self._serving, self._looking) if task]
        while running := [task for task in tasks if not task.done()]:
            for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                task.result()

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let the running ones finish within `grace_s` seconds, then stop. Idempotent."""
        await self._health.enter_graceful_shutdown()
        leaving = asyncio.ensure_future(self._leave())
        if self._status and self._serving and not self._serving.done():
            engine = self._status.engine
            engine.refusal = NotServing("the coordinator is shutting down")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await engine.wait_idle()
            engine.fail(engine.refusal)
            self._serving.cancel()
            await asyncio.wait([self._serving])
        self._warmer.stop()
        await leaving
        # A little more, so that every stream gets its terminal status.
        await self._server.stop(grace=FAREWELL_S if grace_s else 0)
        if self._bound:
            unbind(self.address)
            self._bound = False
        if self._probes:
            await self._probes.stop()
            self._probes = None
        if self._exporter:
            await self._exporter.stop()
        await self._pool.close()

    async def _leave(self) -> None:
        """Look for workers no more, and let another coordinator hand out plans: what runs here needs none."""
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
        if self._exporter and settings.metrics_listen:
            await self._exporter.listen(settings.metrics_listen)
        self._looking = asyncio.create_task(self._neighbours.run(self._pool.follow))
        check_rows(settings.max_rows, self.model.spec.hidden, num_bytes(WIRES[settings.model.wire], (1, self.model.spec.hidden)))
        plan = await asyncio.to_thread(self.model.plan, self._choose_shards(), PAGE_TOKENS)
        metrics = self._exporter.metrics if self._exporter else None
        # Pages are counted when the workers have said how much memory they have.
        engine = Engine(self._limits(num_pages=1), self.model.spec.vocabulary, self.model.spec.context, metrics)
        engine.refusal = NotServing("the workers are loading")
        recoveries = Recoveries()
        self._status = MeshStatus(self._pool, plan, engine, recoveries, metrics=metrics)
        await self._listen()
        supervisor = Supervisor(
            engine=engine,
            spec=self.model.spec,
            resident=await asyncio.to_thread(self.model.resident),
            wire=WIRES[settings.model.wire],
            shard_vocabularies=tuple(shard.vocabulary.end - shard.vocabulary.start for shard in plan.shards),
            assemble=self._assemble,
            wait_changed=self._wait_changed,
            blame=self._pool.blame,
            on_serving=self._note_serving,
            recovery_s=settings.recovery_s,
            recoveries=recoveries,
        )
        await self._neighbours.wait_answered(ANSWER_S)
        fanout = await until_mesh(
            lambda: self._make_first(supervisor, plan),
            self._wait_changed,
            timeout_s=settings.discovery.startup_s,
            heals=lambda error: self._is_shared or heals_by_itself(error),
        )
        engine.refusal = None
        self._serving = asyncio.create_task(supervisor.run(fanout))

    @property
    def _is_shared(self) -> bool:
        """Whether others than who started this coordinator may change the workers."""
        return bool(self._neighbours.source or self._neighbours.lease)

    def _choose_shards(self) -> int:
        if self.settings.shards:
            return self.settings.shards
        # Not of those that answer by now: the mesh would be as large as who started first allows.
        return default_shards(len(self.settings.workers), self.model.spec)

    async def _wait_changed(self, timeout_s: float) -> None:
        if self._looking and self._looking.done():
            self._looking.result()
        await self._pool.wait_changed(timeout_s)

    async def _make_first(self, supervisor: Supervisor, plan: MeshPlan) -> Fanout:
        survey = await self._pool.survey(wait_for_ready=True)
        self._pool.require(survey, len(plan.shards))
        num_pages = kv_pages(plan, survey.reports, PAGE_TOKENS, self.settings.kv_tokens)
        supervisor.engine.resize(self._limits(num_pages))
        return await supervisor.start()

    def _limits(self, num_pages: int) -> Limits:
        settings = self.settings
        return Limits(
            num_pages=num_pages,
            page_tokens=PAGE_TOKENS,
            max_rows=settings.max_rows,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
        )

    async def _listen(self) -> None:
        if self._status is None:
            raise ValueError("listening before the status exists")
        service = GenerationService(self.model, self._status.engine, self._status)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self.settings.health_listen:
            self._probes = await listen_for_probes(self.settings.health_listen, self._health)
        await self._server.start()

    async def _assemble(self) -> Fanout:
        if self._status is None:
            raise ValueError("a mesh before its plan")
        num_pages = self._status.engine.scheduler.limits.num_pages
        return await self._pool.assemble(self._status.plan, self._directory, num_pages, self._on_progress)

    @property
    def _directory(self) -> Path | None:
        return None if self.model.checkpoint is None else self.model.directory

    async def _note_serving(self, fanout: Fanout | None) -> None:
        if self._status is None:
            raise ValueError("a mesh that serves before its plan")
        self._status.fanout = fanout
        state = health_pb2.HealthCheckResponse.SERVING if fanout else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, state)
        if fanout:
            num_pages = self._status.engine.scheduler.limits.num_pages
            log.info("mesh serves", epoch=fanout.epoch, workers=fanout.addresses, kv_pages=num_pages)
            if self.settings.warm_spares and self._directory:
                self._warmer.start(self._status.plan, self._directory, fanout)
