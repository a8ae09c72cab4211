"""A mesh whose rounds are recorded: the private one of `coordctl generate`, or one of given workers, with an observer."""

from __future__ import annotations

import asyncio
import importlib
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.bench.load import make_request
from coordinator.client import GenerationClient
from coordinator.embedded import EmbeddedWorkers
from coordinator.planning.plan import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coordinator.app import Coordinator
    from coordinator.config import ModelSettings
    from coordinator.models.spec import ModelSpec
    from coordinator.planning.plan import MeshPlan
    from coordinator.rounds import Round


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """Which mesh to start, or to take."""

    model: ModelSettings
    shards: int
    threads: int | None
    """Of each worker; None shares the cores evenly."""
    device: str
    kv_tokens: int | None
    """Of the KV cache; None for what is usual and fits."""
    workers: tuple[str, ...] = ()
    """Addresses of workers that run already, as many as shards; none: private ones are started."""
    insecure: bool = False
    """Whether given workers may be reached by TCP without TLS."""
    tls: Path | None = None
    """Folder of the certificate that given workers see."""


@dataclass(frozen=True, slots=True)
class GivenWorkers:
    """Workers that run already, and a folder for this command's own sockets."""

    addresses: tuple[str, ...]
    folder: Path

    @property
    def coordinator_address(self) -> str:
        """Where this command's own coordinator listens."""
        return f"unix:{self.folder}/coordinator.sock"

    async def wait_listening(self) -> None:
        """Nothing to wait for: who takes them waits for their answers."""


@dataclass(frozen=True, slots=True)
class RecordedMesh:
    """A mesh at work."""

    client: GenerationClient
    spec: ModelSpec
    plan: MeshPlan
    folder: Path
    """For sockets; private, and gone with the mesh."""
    load_s: float
    """From the start of the processes until the mesh served."""
    rounds: list[Round]
    """All so far; whoever has seen them clears the list."""

    def take_rounds(self) -> list[Round]:
        """Give the rounds since the last call."""
        taken = list(self.rounds)
        self.rounds.clear()
        return taken


@asynccontextmanager
async def recorded_mesh(settings: MeshSettings, prompt_tokens: int, new_tokens: int) -> AsyncIterator[RecordedMesh]:
    """Start a mesh, and end it.

    Args:
        settings: of the mesh.
        prompt_tokens: of the longest request that will be made; that it fits into the context is checked before loading.
        new_tokens: likewise.

    Raises:
        MeshError: the model, the request or a worker is no good.

    """
    start = time.monotonic()
    rounds: list[Round] = []
    async with AsyncExitStack() as stack:
        workers = await _workers(settings, stack)
        # torch takes seconds to import: here they pass while the workers do the same.
        private_mesh = await asyncio.to_thread(importlib.import_module, "coordinator.private_mesh")
        request = make_request([0] * prompt_tokens, new_tokens)
        coordinator: Coordinator = await private_mesh.start_private_mesh(
            workers, settings.model, settings.kv_tokens, request, rounds.append, insecure=settings.insecure, tls=settings.tls
        )
        stack.push_async_callback(coordinator.stop, grace_s=0)
        client = await stack.enter_async_context(GenerationClient(coordinator.address))
        plan = coordinator.model.plan(settings.shards, PAGE_TOKENS)
        yield RecordedMesh(client, coordinator.model.spec, plan, workers.folder, time.monotonic() - start, rounds)


async def _workers(settings: MeshSettings, stack: AsyncExitStack) -> EmbeddedWorkers | GivenWorkers:
    if not settings.workers:
        return await stack.enter_async_context(EmbeddedWorkers(settings.shards, settings.device, settings.threads))
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shardmesh-"))
    return GivenWorkers(settings.workers, Path(folder))
