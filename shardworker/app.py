"""A running worker in this process: builds, starts and stops; no logic. Used by the command, by tests and by embedded meshes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import shardworker_pb2 as pb
from protos import tls
from protos.errors import InvalidArgument
from protos.health import HealthListener, listen_for_probes
from protos.interceptors import ErrorInterceptor, Guard, admit_all
from protos.listen import bind, unbind
from protos.rpc import MAX_WORKER_REPLY_BYTES, MAX_WORKER_REQUEST_BYTES, check_address, check_metrics_address, server_options
from protos.shardworker_pb2_grpc import add_ShardWorkerServicer_to_server
from shardworker.executor import Executor
from shardworker.holding import Holding
from shardworker.kernels.choose import choose_kernels
from shardworker.peers import admit_coordinators
from shardworker.service import ShardWorkerService

if TYPE_CHECKING:
    from pathlib import Path

    from protos.metrics import MetricsListener
    from shardworker.kernels.interface import Kernels

log = structlog.get_logger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["ShardWorker"].full_name
EXECUTOR_CLOSE_S = 5.0


@dataclass(slots=True)
class RunningWorker:
    """A worker that listens."""

    address: str
    """With the real port."""
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer
    _holding: Holding
    probes: HealthListener | None = None
    metrics: MetricsListener | None = None

    @property
    def metrics_url(self) -> str | None:
        """Where metrics are served; None if they are not."""
        return self.metrics.url if self.metrics else None

    async def stop(self, grace: float) -> bool:
        """Say NOT_SERVING, give running calls `grace` seconds, free all; whether the device's thread ended too."""
        await self._health.enter_graceful_shutdown()
        self._holding.cancel_loading()
        await self._server.stop(grace)
        if self.probes:
            await self.probes.stop()
        if self.metrics:
            await self.metrics.stop()
        unbind(self.address)
        return self._holding.executor.close(EXECUTOR_CLOSE_S)


class _HealthNotifier:
    """Carries changes from plain code to the health service's coroutines."""

    def __init__(self, checker: health.aio.HealthServicer) -> None:
        self._checker = checker
        # The loop keeps only weak references to tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def notify(self, serving: bool) -> None:  # noqa: FBT001  # there is nothing else to say
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        task = asyncio.create_task(self._checker.set(SERVICE_NAME, status))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def start_worker(
    listen: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    insecure: bool = False,
    tls_folder: Path | None = None,
    health_listen: str | None = None,
    metrics_listen: str | None = None,
    kernels: Kernels | None = None,
) -> RunningWorker:
    """Start an empty worker.

    Args:
        listen: `HOST:PORT` (port 0: any free one) or `unix:PATH`.
        device: "auto", "cpu" or "cuda".
        threads: of the arithmetic; by default torch's own choice.
        insecure: whether TCP without TLS was asked for.
        tls_folder: certificates for TCP, see `protos.certificates`: only coordinators are obeyed then.
        health_listen: address of a second listener, in plaintext, for health alone.
        metrics_listen: HOST:PORT of plain HTTP for Prometheus.
        kernels: the arithmetic; by default the fastest for the device.

    Raises:
        InvalidArgument: a bad address, one that is in use, a bad certificate, or a device that is not there.

    """
    check_address(listen, insecure=insecure, tls=tls_folder is not None)
    if health_listen:
        check_address(health_listen, insecure=True)
    if metrics_listen:
        check_metrics_address(metrics_listen)
    credentials, guard = _open_tls(tls_folder) if tls_folder and not listen.startswith("unix:") else (None, admit_all)
    chosen = choose_device(device)
    checker = health.aio.HealthServicer()
    server = grpc.aio.server(
        options=server_options(max_send_bytes=MAX_WORKER_REPLY_BYTES, max_receive_bytes=MAX_WORKER_REQUEST_BYTES),
        interceptors=[ErrorInterceptor(guard)],
    )
    address = await bind(server, listen, credentials)
    executor = Executor(chosen, threads)
    holding = Holding(executor, kernels or choose_kernels(chosen, executor.num_threads), _HealthNotifier(checker).notify)
    worker = RunningWorker(address, server, checker, holding)
    add_ShardWorkerServicer_to_server(ShardWorkerService(holding, _version()), server)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await checker.set("", health_pb2.HealthCheckResponse.SERVING)
    await checker.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        worker.probes = await listen_for_probes(health_listen, checker) if health_listen else None
        worker.metrics = await _serve_metrics(metrics_listen, holding) if metrics_listen else None
    except BaseException:
        await worker.stop(0)
        raise
    await server.start()
    log.info("worker listens", worker=address, tls=credentials is not None, device=chosen.type, threads=executor.num_threads)
    return worker


async def _serve_metrics(address: str, holding: Holding) -> MetricsListener:
    # Who serves no metrics does not wait for their library.
    from shardworker.exposition import listen_for_scrapes  # noqa: PLC0415

    return await listen_for_scrapes(address, holding)


def _open_tls(directory: Path) -> tuple[grpc.ServerCredentials, Guard]:
    # Who uses no TLS does not wait for its library.
    from protos.certificates import Certificates  # noqa: PLC0415

    certificates = Certificates(directory, name=tls.WORKER_NAME)
    return tls.server_credentials(certificates, require_client=True), admit_coordinators


def choose_device(device: str) -> torch.device:
    """Turn the flag into a device.

    Raises:
        InvalidArgument: not a device, or CUDA where there is none.

    """
    if device not in {"auto", "cpu", "cuda"}:
        raise InvalidArgument(f"device {device!r} is neither auto, cpu nor cuda")
    has_cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise InvalidArgument("device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda", 0) if has_cuda else torch.device("cpu")


def _version() -> str:
    try:
        return version("shardmesh")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
