"""A mesh in one process and without sockets: callers' messages through the real service, engine, fan-out and workers.

What the sessions carry is kept, so that real messages can be changed, and can be changed on the way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from coordinator.config import ModelSettings
from coordinator.engine import Engine
from coordinator.fanout import Fanout
from coordinator.forward import Forward
from coordinator.head import Head
from coordinator.scheduler import Limits
from coordinator.served_model import ServedModel
from coordinator.service import GenerationService
from protos import tensor_pb2
from protos.errors import TopologyError
from protos.rpc import PROTOCOL_VERSION
from protos.shardworker_pb2 import ExecuteRequest, LoadRequest
from shardworker.executor import Executor
from shardworker.holding import Holding
from shardworker.kernels.choose import choose_kernels
from shardworker.service import ExecuteStream, ShardWorkerService
from tests.tiny import add_tokenizer, make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.planning.plan import MeshPlan

CPU = torch.device("cpu")
PAGE_TOKENS = 4
NUM_PAGES = 64
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% if tools %}{{ tools | tojson }}{% endif %}{% endfor %}"
    "<assistant>"
)


def make_model(name: str, directory: Path) -> None:
    """Write a tiny model with a tokenizer and a chat template."""
    make_checkpoint(name, directory)
    add_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)


class Worker:
    """A worker without a server."""

    def __init__(self) -> None:
        self.executor = Executor(CPU, 1)
        self.holding = Holding(self.executor, choose_kernels(CPU, 1), lambda _: None)
        self.service = ShardWorkerService(self.holding, "0")

    async def load(self, request: LoadRequest) -> None:
        async for _ in self.holding.load(request):
            pass


def load_request(plan: MeshPlan, shard: int, directory: Path, assignment: int = 1) -> LoadRequest:
    return LoadRequest(
        protocol_version=PROTOCOL_VERSION,
        plan=plan.shards[shard],
        shard_digests=plan.shard_digests,
        assignment=assignment,
        directory=str(directory),
    )


class Session:
    """What `Fanout` wants of a `WorkerSession`, on an `ExecuteStream` at hand."""

    def __init__(self, worker: Worker, shard: int, kept: list[list[bytes]], alter: Callable[[int, bytes], bytes]) -> None:
        self.address = f"worker-{shard}"
        self._stream = ExecuteStream(worker.holding)
        self._shard, self._kept, self._alter = shard, kept, alter
        self._answers: deque[bytes] = deque()

    async def write(self, data: bytes) -> None:
        answer = await self._stream.answer(ExecuteRequest.FromString(data))
        self._kept[self._shard].append(data)
        self._answers.append(self._alter(self._shard, answer.SerializeToString()))

    async def read(self) -> bytes:
        return self._answers.popleft()

    def cancel(self) -> None:
        self._stream.close()


class Stack:
    """A model, its workers, and how to make meshes of them."""

    def __init__(self, model: ServedModel, plan: MeshPlan, workers: list[Worker]) -> None:
        self.model, self.plan, self.workers = model, plan, workers
        self.kept: list[list[bytes]] = [[] for _ in workers]
        """Requests to each shard since it was cleared."""
        self.epoch = 0

    @classmethod
    async def start(cls, directory: Path, num_shards: int) -> Stack:
        model = ServedModel.open(ModelSettings(str(directory), dtype="f32", wire="f32"))
        plan = model.plan(num_shards, PAGE_TOKENS)
        workers = [Worker() for _ in range(num_shards)]
        for shard, worker in enumerate(workers):
            await worker.load(load_request(plan, shard, directory))
        return cls(model, plan, workers)

    async def mesh(self, alter: Callable[[int, bytes], bytes] = lambda _, data: data) -> Mesh:
        self.epoch += 1
        sessions: list[Any] = [Session(worker, shard, self.kept, alter) for shard, worker in enumerate(self.workers)]
        fanout = Fanout(sessions, self.plan.digest, self.epoch)
        await fanout.open(bytes(16), NUM_PAGES)
        sizes = tuple(shard.vocabulary.end - shard.vocabulary.start for shard in self.plan.shards)
        wire = tensor_pb2.DTYPE_F32
        return Mesh(fanout, Forward(self.model.spec, self.model.resident(), fanout, wire), Head(fanout, wire, sizes))

    def engine(self) -> Engine:
        limits = Limits(num_pages=NUM_PAGES, page_tokens=PAGE_TOKENS, max_rows=32, max_running=4, max_waiting=64)
        return Engine(limits, self.model.spec.vocabulary, self.model.spec.context)


@dataclass
class Mesh:
    fanout: Fanout
    forward: Forward
    head: Head


async def _refuse_reshard(num_shards: int) -> None:
    raise TopologyError(f"{num_shards} shards cannot be had here")


class Serving:
    """The public service on a mesh."""

    def __init__(self, stack: Stack, mesh: Mesh) -> None:
        self.engine = stack.engine()
        status: Any = SimpleNamespace(report=None)
        self.service = GenerationService(stack.model, self.engine, status, _refuse_reshard)
        self.task = asyncio.ensure_future(self.engine.run(mesh.forward, mesh.head))

    async def generate(self, request: Any, most: int = 10**6, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> list[Any]:
        """Responses, the first `most` of them; then the call is cancelled."""
        responses = []
        context: Any = SimpleNamespace(invocation_metadata=lambda: metadata)
        stream = self.service.Generate(request, context)
        try:
            async for response in stream:
                responses.append(response)
                if len(responses) >= most:
                    break
        finally:
            await stream.aclose()
        return responses
