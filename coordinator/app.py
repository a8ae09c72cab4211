"""The composition root: builds a coordinator from its settings, starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.config import WIRES
from coordinator.engine import Engine
from coordinator.planning.capacity import check_rows, kv_pages
from coordinator.planning.placement import default_shards
from coordinator.scheduler import Limits
from coordinator.service import GenerationService
from coordinator.status import MeshStatus
from coordinator.supervisor import Supervisor
from coordinator.workers.pool import WorkerPool
from protos import generation_pb2, generation_pb2_grpc, rpc
from protos.errors import NotServing
from protos.interceptors import ErrorInterceptor
from protos.listen import bind, unbind
from protos.tensors import num_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.config import ServeSettings
    from coordinator.fanout import Fanout
    from coordinator.planning.plan import MeshPlan
    from coordinator.rounds import RoundObserver
    from coordinator.served_model import ServedModel
    from coordinator.workers.pool import LoadEvent, Survey

log = structlog.get_logger(__name__)

PAGE_TOKENS = 16
"""Tokens of a KV page: small enough to waste little on short sequences."""

FAREWELL_S = 2.0
"""Longest that ended streams may take to hear of it, seconds."""

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


class Coordinator:
    """A running coordinator."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel,
        on_progress: Callable[[LoadEvent], None],
        observer: RoundObserver | None = None,
    ) -> None:
        """Build what needs no network; `start` does the rest."""
        self.settings = settings
        self.model = model
        self.address = settings.listen
        self._on_progress = on_progress
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=rpc.server_options(max_send_bytes=rpc.MAX_CALLER_BYTES, max_receive_bytes=rpc.MAX_CALLER_BYTES),
        )
        self._health = health.aio.HealthServicer()
        self._pool = WorkerPool(settings.workers, observer)
        self._bound = False
        self._status: MeshStatus | None = None
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        settings: ServeSettings,
        model: ServedModel,
        on_progress: Callable[[LoadEvent], None],
        observer: RoundObserver | None = None,
    ) -> Self:
        """Listen, load the workers, serve.

        Args:
            settings: of the service.
            model: to serve.
            on_progress: called for each step of loading.
            observer: told of each round.

        Raises:
            MeshError: the address is taken, the model cannot be cut like this, or no full mesh can be had.

        """
        coordinator = cls(settings, model, on_progress, observer)
        try:
            await coordinator._start()
        except BaseException:
            await coordinator.stop(grace_s=0)
            raise
        return coordinator

    async def wait(self) -> None:
        """Serve until something unforeseen breaks, and raise that; cancelling it stops nothing."""
        if self._serving:
            await asyncio.shield(self._serving)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let the running ones finish within `grace_s` seconds, then stop. Idempotent."""
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
        # A little more, so that every stream gets its terminal status.
        await self._server.stop(grace=FAREWELL_S if grace_s else 0)
        if self._bound:
            unbind(self.address)
            self._bound = False
        await self._pool.close()

    async def _start(self) -> None:
        settings = self.settings
        self.address = await bind(self._server, settings.listen)
        self._bound = True
        survey = await self._pool.survey(wait_for_ready=True)
        num_shards = settings.shards or default_shards(len(survey.reports) or 1, self.model.spec)
        plan = await asyncio.to_thread(self.model.plan, num_shards, PAGE_TOKENS)
        engine = Engine(self._limits(plan, survey), self.model.spec.vocabulary, self.model.spec.context)
        engine.refusal = NotServing("the workers are loading")
        self._status = MeshStatus(self._pool, plan, engine)
        await self._listen()
        supervisor = Supervisor(
            engine=engine,
            spec=self.model.spec,
            resident=await asyncio.to_thread(self.model.resident),
            wire=WIRES[settings.model.wire],
            shard_vocabularies=tuple(shard.vocabulary.end - shard.vocabulary.start for shard in plan.shards),
            assemble=self._assemble,
            on_serving=self._note_serving,
            recovery_s=settings.recovery_s,
        )
        fanout = await self._assemble()
        engine.refusal = None
        self._serving = asyncio.create_task(supervisor.run(fanout))

    def _limits(self, plan: MeshPlan, survey: Survey) -> Limits:
        if not survey.reports:
            raise next(iter(survey.failures.values()))
        settings = self.settings
        check_rows(settings.max_rows, self.model.spec.hidden, num_bytes(WIRES[settings.model.wire], (1, self.model.spec.hidden)))
        return Limits(
            num_pages=kv_pages(plan, survey.reports, PAGE_TOKENS, settings.kv_tokens),
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
        await self._server.start()

    async def _assemble(self) -> Fanout:
        if self._status is None:
            raise ValueError("a mesh before its plan")
        directory = None if self.model.checkpoint is None else self.model.directory
        num_pages = self._status.engine.scheduler.limits.num_pages
        fanout = await self._pool.assemble(self._status.plan, directory, num_pages, self._on_progress)
        self._status.fanout = fanout
        log.info("mesh serves", epoch=fanout.epoch, workers=fanout.addresses, kv_pages=num_pages)
        return fanout

    async def _note_serving(self, serving: bool) -> None:  # noqa: FBT001  # it is the whole message
        if self._status and not serving:
            self._status.fanout = None
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, state)
