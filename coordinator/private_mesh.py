"""A coordinator for the lifetime of one command: on embedded workers, or on given ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from coordinator.app import Coordinator
from coordinator.config import SecuritySettings, ServeSettings
from coordinator.intake import read_request
from coordinator.progress import LoadProgress
from coordinator.served_model import ServedModel

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.config import ModelSettings
    from coordinator.rounds import RoundObserver
    from protos.generation_pb2 import GenerateRequest


class Workers(Protocol):
    """Where the workers are; `coordinator.embedded.EmbeddedWorkers` is one."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the workers."""

    @property
    def coordinator_address(self) -> str:
        """Where this command's own coordinator listens."""

    async def wait_listening(self) -> None:
        """Wait until all workers listen."""


async def start_private_mesh(
    workers: Workers,
    settings: ModelSettings,
    kv_tokens: int | None,
    request: GenerateRequest,
    observer: RoundObserver | None = None,
    *,
    insecure: bool = False,
    tls: Path | None = None,
) -> Coordinator:
    """Serve a model on workers that nobody else uses.

    Args:
        workers: one for each shard; they need not listen yet.
        settings: of the model.
        kv_tokens: of the KV cache; None for what is usual and fits.
        request: that will be made: what is wrong with it is said before minutes are spent on loading.
        observer: told of each round.
        insecure: whether workers may be reached by TCP without TLS.
        tls: folder of the certificate that workers reached by TCP see; None for plaintext.

    Raises:
        MeshError: the model, the request or a worker is no good.

    """
    model = await asyncio.to_thread(ServedModel.open, settings)
    await asyncio.to_thread(read_request, request, model, model.spec.context)
    await workers.wait_listening()
    serving = ServeSettings(
        model=settings,
        listen=workers.coordinator_address,
        workers=workers.addresses,
        insecure=insecure,
        security=SecuritySettings(tls=tls),
        shards=len(workers.addresses),
        kv_tokens=kv_tokens,
        # Nobody will start another worker here.
        recovery_s=0,
    )
    with LoadProgress() as progress:
        return await Coordinator.start(serving, model, progress, observer)
