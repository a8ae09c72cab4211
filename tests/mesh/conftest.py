"""A real mesh in one process: real gRPC over unix sockets, real workers, a real coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.app import Coordinator
from coordinator.client import GenerationClient
from coordinator.config import ModelSettings, ServeSettings
from coordinator.served_model import ServedModel
from protos import generation_pb2
from shardworker.app import RunningWorker, start_worker
from shardworker.kernels.interface import Kernels
from tests.tiny import make_checkpoint


@dataclass
class Mesh:
    coordinator: Coordinator
    workers: list[RunningWorker]
    client: GenerationClient

    @classmethod
    @asynccontextmanager
    async def connect(cls, coordinator: Coordinator, workers: list[RunningWorker]) -> AsyncIterator[Mesh]:
        async with GenerationClient(coordinator.address) as client:
            yield cls(coordinator, workers, client)

    async def generate(self, prompt: list[int], max_tokens: int = 48, **fields: Any) -> Completed:
        """Complete one prompt of token ids; extra keywords are fields of the request or of its sampling."""
        sampling = fields.pop("sampling", {})
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            max_tokens=max_tokens,
            sampling=generation_pb2.Sampling(**sampling),
            **{"ignore_eos": True, **fields},
        )
        result = Completed()
        async for response in self.client.generate(request):
            result.add(response)
        return result


class Completed:
    """All that came of one call."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[generation_pb2.TokenLogprobs] = []
        self.finished: generation_pb2.Finished | None = None

    def add(self, response: generation_pb2.GenerateResponse) -> None:
        assert self.finished is None, "something followed the terminal message"
        kind = response.WhichOneof("event")
        if kind == "delta":
            self.tokens += response.delta.token_ids
            self.text += response.delta.text
            self.logprobs += response.delta.logprobs
        elif kind == "finished":
            self.finished = response.finished


async def start_coordinator(settings: ServeSettings) -> Coordinator:
    return await Coordinator.start(settings, ServedModel.open(settings.model), lambda _: None)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of `tests.tiny` by its name, made once; nobody changes it."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("model") / name
            make_checkpoint(name, folders[name])
        return folders[name]

    return make


MeshMaker = Callable[..., AbstractAsyncContextManager[Mesh]]


@pytest.fixture
def mesh(tmp_path: Path) -> MeshMaker:
    """`async with mesh(model_directory, shards=3) as running:`; further keywords are settings."""

    @asynccontextmanager
    async def make(
        directory: Path,
        shards: int,
        *,
        spares: int = 0,
        dtype: str = "f32",
        wire: str = "f32",
        quantization: str = "none",
        kernels: Kernels | None = None,
        **settings: Any,
    ) -> AsyncIterator[Mesh]:
        async with AsyncExitStack() as stack:
            sockets = tmp_path / f"mesh-{len(list(tmp_path.iterdir()))}"
            sockets.mkdir()
            workers = []
            for number in range(shards + spares):
                address = f"unix:{sockets}/{number}"
                worker = await start_worker(address, device="cpu", threads=torch.get_num_threads(), kernels=kernels)
                stack.push_async_callback(worker.stop, 0)
                workers.append(worker)
            coordinator = await start_coordinator(
                ServeSettings(
                    model=ModelSettings(str(directory), dtype=dtype, wire=wire, quantization=quantization),
                    listen=f"unix:{sockets}/c",
                    workers=tuple(worker.address for worker in workers),
                    **{"shards": shards, "recovery_s": 10.0, **settings},
                )
            )
            stack.push_async_callback(coordinator.stop, 0)
            yield await stack.enter_async_context(Mesh.connect(coordinator, workers))

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Workers of one process share its cores."""
    torch.set_num_threads(1)
