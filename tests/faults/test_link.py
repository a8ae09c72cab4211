"""What a coordinator makes of a stream that breaks under its hands, by the clock of a network that is reset."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from coordinator.workers.client import WorkerClient
from protos.errors import MeshError, WorkerLost
from tests.faults.link import Link

TRIES = 20


class _Echo(grpc.GenericRpcHandler):
    """Answers each message of any stream with itself."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        del handler_call_details

        async def echo(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            del context
            async for request in requests:
                yield request

        return grpc.stream_stream_rpc_method_handler(echo)


async def _error_of_a_reset(address: str, link: Link) -> MeshError:
    async with WorkerClient(address) as client:
        session = client.execute()
        await session.write(b"1")
        assert await session.read() == b"1"
        link.reset()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                try:
                    while True:
                        await session.write(b"2" * 100_000)
                except MeshError as error:
                    return error
    raise AssertionError("waited 10 s in vain: a reset connection to break its stream")


async def test_a_write_into_a_connection_that_is_reset_says_that_the_worker_is_lost(short_path: Path) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(),))
    server.add_insecure_port(f"unix:{short_path}/s")
    await server.start()
    try:
        async with Link(f"{short_path}/s") as link:
            errors = [await _error_of_a_reset(link.address, link) for _ in range(TRIES)]
    finally:
        await server.stop(0)
    assert [str(error) for error in errors if not isinstance(error, WorkerLost)] == []
