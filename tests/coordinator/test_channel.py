"""A channel that follows its certificates: new calls on a new one, old calls to their end on the old one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from coordinator.channel import PeerChannel
from protos import tls
from protos.certificates import Certificates
from protos.rpc import channel_options
from tests.authority import COORDINATOR_NAMES, TestAuthority

OPTIONS = channel_options(max_send_bytes=1000, max_receive_bytes=1000)
DEADLINE_S = 20
METHOD = "/test.Test/Echo"


async def echo(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    del context
    async for request in requests:
        yield request


@asynccontextmanager
async def serving(certificates: Certificates) -> AsyncIterator[str]:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Echo": handler}),))
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(certificates, require_client=True))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def echoes(call: grpc.aio.StreamStreamCall) -> bool:
    await call.write(b"x")
    return bool(await asyncio.wait_for(call.read(), DEADLINE_S) == b"x")


@pytest.fixture
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def own(tmp_path: Path, authority: TestAuthority) -> Path:
    return authority.issue(tmp_path / "own", *COORDINATOR_NAMES)


@pytest.fixture
def worker(tmp_path: Path, authority: TestAuthority) -> Certificates:
    return Certificates(authority.issue(tmp_path / "worker", tls.WORKER_NAME))


async def test_the_channel_stays_as_long_as_the_files_do(own: Path, worker: Certificates) -> None:
    async with serving(worker) as address:
        channel = PeerChannel(address, OPTIONS, Certificates(own), tls.WORKER_NAME)
        assert channel.current() is channel.current()
        assert await echoes(channel.current().stream_stream(METHOD)())
        await channel.close()


async def test_a_call_under_way_goes_on_and_its_channel_closes_with_it(
    own: Path, worker: Certificates, authority: TestAuthority
) -> None:
    async with serving(worker) as address:
        channel = PeerChannel(address, OPTIONS, Certificates(own), tls.WORKER_NAME)
        before = channel.current()
        call = before.stream_stream(METHOD)()
        assert await echoes(call)
        authority.issue(own, *COORDINATOR_NAMES)
        after = channel.current()
        assert after is not before
        assert await echoes(after.stream_stream(METHOD)())
        assert await echoes(call)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert list(channel._replaced) == [before]
        del before
        assert not channel._replaced
        await channel.close()


async def test_closing_ends_calls_of_all_channels(own: Path, worker: Certificates, authority: TestAuthority) -> None:
    async with serving(worker) as address:
        channel = PeerChannel(address, OPTIONS, Certificates(own), tls.WORKER_NAME)
        before = channel.current()
        old = before.stream_stream(METHOD)()
        assert await echoes(old)
        authority.issue(own, *COORDINATOR_NAMES)
        new = channel.current().stream_stream(METHOD)()
        assert await echoes(new)
        await channel.close()
        assert await asyncio.wait_for(old.code(), DEADLINE_S) is grpc.StatusCode.CANCELLED
        assert await asyncio.wait_for(new.code(), DEADLINE_S) is grpc.StatusCode.CANCELLED


async def test_a_socket_file_never_uses_tls(own: Path, tmp_path: Path) -> None:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Echo": handler}),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    channel = PeerChannel(f"unix:{tmp_path}/s", OPTIONS, Certificates(own), tls.WORKER_NAME)
    assert await echoes(channel.current().stream_stream(METHOD)())
    await channel.close()
    await server.stop(None)
