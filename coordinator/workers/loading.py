"""How one worker is brought to hold its shard: asked, watched, and where it does not see the model's files, supplied."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import rpc
from protos.digest import mesh_digest
from protos.errors import MeshError, WorkerLost
from protos.shardworker_pb2 import SupplyOffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
    from typing import Any

    from coordinator.workers.client import WorkerClient
    from coordinator.workers.supplier import Supplier
    from protos.shardworker_pb2 import LoadRequest


@dataclass(frozen=True, slots=True)
class LoadEvent:
    """A worker's progress."""

    shard: int
    address: str
    loaded_bytes: int
    total_bytes: int


async def load(
    client: WorkerClient, request: LoadRequest, supplier: Supplier | None, on_progress: Callable[[LoadEvent], None]
) -> None:
    """Have a worker load its shard, to the end.

    Args:
        client: of the worker.
        request: says whether the files' bytes are supplied.
        supplier: who has them then.
        on_progress: called for each step of loading.

    Raises:
        MeshError: the worker refuses, dies, is silent, or makes no progress for too long.

    """
    async with _supplied(client, request, supplier):
        await _load(client, request, on_progress)


async def _load(client: WorkerClient, request: LoadRequest, on_progress: Callable[[LoadEvent], None]) -> None:
    shard, address, loaded_bytes, progressed = request.plan.shard, client.address, -1, time.monotonic()
    async with aclosing(client.load(request)) as responses:
        async for response in responses:
            if response.WhichOneof("event") == "loaded":
                held = response.loaded.weights_bytes
                on_progress(LoadEvent(shard, address, held, held))
                return
            progress = response.progress
            if progress.loaded_bytes != loaded_bytes:
                loaded_bytes, progressed = progress.loaded_bytes, time.monotonic()
            elif time.monotonic() - progressed > rpc.LOAD_STALL_S:
                raise WorkerLost(f"worker {address} is stuck at {loaded_bytes} of {progress.total_bytes} bytes of weights")
            on_progress(LoadEvent(shard, address, progress.loaded_bytes, progress.total_bytes))
    raise WorkerLost(f"worker {address} ended loading without an answer")


@contextlib.asynccontextmanager
async def _supplied(client: WorkerClient, request: LoadRequest, supplier: Supplier | None) -> AsyncIterator[None]:
    """Answer what the worker asks for as long as the context lasts, which begins when it may ask."""
    if supplier is None:
        yield
        return
    offer = SupplyOffer(
        protocol_version=rpc.PROTOCOL_VERSION, plan_digest=mesh_digest(request.shard_digests), shard=request.plan.shard
    )
    taken = asyncio.Event()
    supplying = asyncio.ensure_future(client.supply(offer, supplier, taken))
    taking = asyncio.ensure_future(taken.wait())
    try:
        await asyncio.wait([supplying, taking], return_when=asyncio.FIRST_COMPLETED)
        if not taken.is_set():
            supplying.result()
            raise WorkerLost(f"worker {client.address} does not want to be supplied")
        # Should it break later, the worker's load fails, and says why.
        yield
    finally:
        for task in (supplying, taking):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, MeshError):
            await supplying


async def load_all(loads: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run loads side by side; the first failure is raised by itself.

    A failure that another attempt would meet again cancels the rest. A worker that is lost does not: what the others load, they
    keep, and a spare needs to load one shard only.
    """
    tasks = [asyncio.ensure_future(one) for one in loads]
    try:
        pending: set[asyncio.Future[None]] = set(tasks)
        while pending and all(error is None or isinstance(error, WorkerLost) for error in _errors(tasks)):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if errors := [error for error in _errors(tasks) if error]:
            # What cancels the rest before what does not.
            raise min(errors, key=lambda error: isinstance(error, WorkerLost))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _errors(tasks: Iterable[asyncio.Future[None]]) -> list[BaseException | None]:
    return [task.exception() for task in tasks if task.done() and not task.cancelled()]
