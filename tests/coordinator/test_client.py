"""The caller's side: errors come out as they went in, closing cancels."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.client import GenerationClient
from protos.errors import InvalidArgument, MeshError, QueueFull, TopologyError, WorkerLost
from protos.generation_pb2 import (
    Accepted,
    GenerateRequest,
    GenerateResponse,
    GetMeshResponse,
    GetModelResponse,
    ReshardRequest,
    ReshardResponse,
)
from protos.generation_pb2_grpc import GenerationServicer, add_GenerationServicer_to_server
from protos.interceptors import ErrorInterceptor


class FakeGeneration(GenerationServicer):
    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.asked: list[int] = []

    async def Generate(self, message: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:  # noqa: N802
        del context
        try:
            yield GenerateResponse(accepted=Accepted(request_id=message.request_id))
            if message.request_id == "full":
                raise QueueFull("3 requests are waiting already")
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def GetModel(self, message: Any, context: Any) -> GetModelResponse:  # noqa: N802
        del message, context
        raise InvalidArgument("no")

    async def GetMesh(self, message: Any, context: Any) -> GetMeshResponse:  # noqa: N802
        del message, context
        return GetMeshResponse(epoch=4)

    async def Reshard(self, message: ReshardRequest, context: Any) -> ReshardResponse:  # noqa: N802
        del context
        if message.num_shards > 4:
            raise TopologyError("there are 4 heads")
        self.asked.append(message.num_shards)
        return ReshardResponse()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[FakeGeneration, GenerationClient]]:
    service, server = FakeGeneration(), grpc.aio.server(interceptors=[ErrorInterceptor()])
    add_GenerationServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{tmp_path}/c")
    await server.start()
    async with GenerationClient(f"unix:{tmp_path}/c") as client:
        yield service, client
    await server.stop(0)


async def test_closing_the_stream_cancels_the_call(served: tuple[FakeGeneration, GenerationClient]) -> None:
    service, client = served
    async with contextlib.aclosing(client.generate(GenerateRequest(request_id="mine"))) as responses:
        async for response in responses:
            assert response.accepted.request_id == "mine"
            break
    await asyncio.wait_for(service.ended.wait(), 5)


async def test_errors_keep_their_class_and_name_the_coordinator(
    served: tuple[FakeGeneration, GenerationClient], tmp_path: Path
) -> None:
    _, client = served
    with pytest.raises(QueueFull, match=f"coordinator unix:{tmp_path}/c: 3 requests are waiting"):
        async for _ in client.generate(GenerateRequest(request_id="full")):
            pass
    with pytest.raises(InvalidArgument, match="no"):
        await client.model()
    assert (await client.mesh()).epoch == 4


async def test_request_over_the_limit_is_an_error_of_ours(served: tuple[FakeGeneration, GenerationClient]) -> None:
    _, client = served
    with pytest.raises(MeshError, match="larger than max"):
        async for _ in client.generate(GenerateRequest(text="x" * 5 * 2**20)):
            pass


async def test_another_number_of_shards_is_asked_for_once(served: tuple[FakeGeneration, GenerationClient]) -> None:
    service, client = served
    await client.reshard(3)
    assert service.asked == [3]
    with pytest.raises(TopologyError, match="there are 4 heads"):
        await client.reshard(5)
    assert service.asked == [3]


async def test_a_coordinator_without_the_call_is_told_apart(tmp_path: Path) -> None:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    server.add_insecure_port(f"unix:{tmp_path}/c")
    await server.start()
    async with GenerationClient(f"unix:{tmp_path}/c") as client:
        with pytest.raises(
            MeshError, match=r"does not offer shardmesh.v1.Generation: is it a coordinator, and of this version\?"
        ):
            await client.reshard(3)
    await server.stop(0)


async def test_nobody_there_is_a_lost_peer(tmp_path: Path) -> None:
    async with GenerationClient(f"unix:{tmp_path}/nobody") as client:
        with pytest.raises(WorkerLost, match="coordinator unix:"):
            await client.mesh()
        with pytest.raises(WorkerLost, match="coordinator unix:"):
            await anext(client.generate(GenerateRequest(text="x")))
