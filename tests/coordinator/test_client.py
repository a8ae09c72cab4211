"""The caller's side: errors come out as they went in, closing cancels."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.client import GenerationClient
from protos.errors import InvalidArgument, MeshError, QueueFull, WorkerLost
from protos.generation_pb2 import Accepted, GenerateRequest, GenerateResponse, GetMeshResponse, GetModelResponse
from protos.generation_pb2_grpc import GenerationServicer, add_GenerationServicer_to_server
from protos.interceptors import ErrorInterceptor


class FakeGeneration(GenerationServicer):
    def __init__(self) -> None:
        self.ended = asyncio.Event()

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


async def test_nobody_there_is_a_lost_peer(tmp_path: Path) -> None:
    async with GenerationClient(f"unix:{tmp_path}/nobody") as client:
        with pytest.raises(WorkerLost, match="coordinator unix:"):
            await client.mesh()
        with pytest.raises(WorkerLost, match="coordinator unix:"):
            await anext(client.generate(GenerateRequest(text="x")))
