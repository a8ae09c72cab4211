"""A coordinator on the embedded workers of one command."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from coordinator.app import Coordinator
from coordinator.config import ServeSettings
from coordinator.intake import read_request
from coordinator.progress import LoadProgress
from coordinator.served_model import ServedModel

if TYPE_CHECKING:
    from coordinator.config import ModelSettings
    from coordinator.embedded import EmbeddedWorkers
    from coordinator.rounds import RoundObserver
    from protos.generation_pb2 import GenerateRequest


async def start_private_mesh(
    workers: EmbeddedWorkers,
    settings: ModelSettings,
    kv_tokens: int | None,
    request: GenerateRequest,
    observer: RoundObserver | None = None,
) -> Coordinator:
    """Serve a model on workers that were just started.

    Args:
        workers: one for each shard; they need not listen yet.
        settings: of the model.
        kv_tokens: of the KV cache; None for what is usual and fits.
        request: that will be made: what is wrong with it is said before minutes are spent on loading.
        observer: told of each round.

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
        shards=len(workers.addresses),
        kv_tokens=kv_tokens,
        # Nobody will start another worker here.
        recovery_s=0,
    )
    with LoadProgress() as progress:
        return await Coordinator.start(serving, model, progress, observer)
