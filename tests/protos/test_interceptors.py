"""The error table through a real server: what is raised on one end arrives on the other, whatever kind of call it is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from protos.errors import ERRORS, Forbidden, InvalidArgument, MeshError, QueueFull, WorkerLost, from_rpc_error
from protos.interceptors import ErrorInterceptor, Guard, admit_all
from protos.rpc import channel_options, server_options
from protos.tensor_pb2 import Tensor

LIMIT = 64 * 1024
DEADLINE_S = 20
INVALID = b"\xff"


class Servicer:
    """Answers each message with itself; raises `error` in answer to one without data."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.ended = asyncio.Event()

    async def unary(self, request: Tensor, _: grpc.aio.ServicerContext) -> Tensor:
        if not request.data:
            raise self.error
        return request

    async def stream(self, request: Tensor, _: grpc.aio.ServicerContext) -> AsyncIterator[Tensor]:
        try:
            yield Tensor(shape=[1])
            if not request.data:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def bidi(self, requests: AsyncIterator[Tensor], _: grpc.aio.ServicerContext) -> AsyncIterator[Tensor]:
        async for request in requests:
            if not request.data:
                raise self.error
            yield request

    async def collect(self, requests: AsyncIterator[Tensor], _: grpc.aio.ServicerContext) -> Tensor:
        async for request in requests:
            if not request.data:
                raise self.error
        return Tensor()

    def handler(self) -> grpc.GenericRpcHandler:
        codec = {"request_deserializer": Tensor.FromString, "response_serializer": Tensor.SerializeToString}
        return grpc.method_handlers_generic_handler(
            "test.Test",
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self.unary, **codec),
                "Stream": grpc.unary_stream_rpc_method_handler(self.stream, **codec),
                "Bidi": grpc.stream_stream_rpc_method_handler(self.bidi, **codec),
                "Collect": grpc.stream_unary_rpc_method_handler(self.collect, **codec),
            },
        )


Serve = Callable[[Servicer], Any]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serve(servicer: Servicer, guard: Guard = admit_all) -> AsyncIterator[grpc.aio.Channel]:
        options = server_options(max_send_bytes=LIMIT, max_receive_bytes=LIMIT)
        server = grpc.aio.server(interceptors=[ErrorInterceptor(guard)], options=options)
        server.add_generic_rpc_handlers((servicer.handler(),))
        server.add_insecure_port(f"unix:{tmp_path}/s")
        await server.start()
        try:
            # The client may send and receive more than the server.
            async with grpc.aio.insecure_channel(
                f"unix:{tmp_path}/s", options=channel_options(max_send_bytes=4 * LIMIT, max_receive_bytes=4 * LIMIT)
            ) as channel:
                yield channel
        finally:
            await server.stop(None)

    return serve


def as_bytes(request: Tensor | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def method(channel: grpc.aio.Channel, kind: str) -> Any:
    name = {"unary": "unary_unary", "stream": "unary_stream", "bidi": "stream_stream", "collect": "stream_unary"}[kind]
    return getattr(channel, name)(f"/test.Test/{kind.capitalize()}", as_bytes, Tensor.FromString)


async def call(channel: grpc.aio.Channel, kind: str, request: Tensor | bytes) -> MeshError:
    """Send a request (on a stream: after a good one) that must fail; what arrives, as the client's code sees it."""
    good = Tensor(data=b"1")
    sent: Tensor | bytes | Iterator[Tensor | bytes] = iter([good, request]) if kind in {"bidi", "collect"} else request
    under_way = method(channel, kind)(sent, timeout=DEADLINE_S)
    received = []
    try:
        if isinstance(under_way, Awaitable):
            received = [await under_way]
        else:
            received += [response async for response in under_way]
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, "peer")
    raise AssertionError(f"the call succeeded: {received}")


KINDS = pytest.mark.parametrize("kind", ["unary", "stream", "bidi", "collect"])


@KINDS
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
async def test_an_error_arrives_as_its_own_class_with_its_text(serve: Serve, kind: str, error: type[MeshError]) -> None:
    async with serve(Servicer(error("wanted 2, found 3: add workers"))) as channel:
        arrived = await call(channel, kind, Tensor())
    assert type(arrived) is error
    assert str(arrived) == "peer: wanted 2, found 3: add workers"


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_call_without_its_message_is_the_callers_fault(serve: Serve, kind: str) -> None:
    servicer = Servicer(AssertionError("never reached"))
    async with serve(servicer) as channel:
        name = method(channel, kind)._method.decode()
        stream = channel.stream_stream(name)(timeout=DEADLINE_S)
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "without its message" in await stream.details()


@KINDS
async def test_bytes_that_are_no_message_are_the_callers_fault(serve: Serve, kind: str) -> None:
    servicer = Servicer(AssertionError("never reached"))
    async with serve(servicer) as channel:
        arrived = await call(channel, kind, INVALID)
        assert type(arrived) is InvalidArgument
        assert "not a valid message" in str(arrived)
        # The server lives on.
        assert (await method(channel, "unary")(Tensor(data=b"x"), timeout=DEADLINE_S)).data == b"x"


@KINDS
async def test_a_plain_exception_is_internal_and_told_to_the_log_only(serve: Serve, kind: str) -> None:
    with structlog.testing.capture_logs() as lines:
        async with serve(Servicer(RuntimeError("secret"))) as channel:
            arrived = await call(channel, kind, Tensor())
    assert type(arrived) is MeshError
    assert str(arrived) == "peer: internal error; the server's log has the details"
    (line,) = lines
    assert line["event"] == "servicer failed"
    assert line["log_level"] == "error"
    assert line["error"] == "RuntimeError"
    assert "raise self.error" in line["frames"]
    # What went wrong may be a prompt.
    assert "secret" not in str(line)


@pytest.mark.parametrize("character", ["x", "%", "\n", "é", "漢", "😀", "\udcff"])
async def test_long_texts_of_any_script_arrive(serve: Serve, character: str) -> None:
    async with serve(Servicer(QueueFull(character * 100_000))) as channel:
        arrived = await call(channel, "unary", Tensor())
    assert type(arrived) is QueueFull
    assert str(arrived).endswith("...")


@KINDS
async def test_a_message_over_the_limit_does_not_mean_that_the_peer_is_lost(serve: Serve, kind: str) -> None:
    async with serve(Servicer(AssertionError("never reached"))) as channel:
        arrived = await call(channel, kind, Tensor(data=bytes(2 * LIMIT)))
    assert type(arrived) is MeshError
    assert "larger than max" in str(arrived)


async def test_an_unknown_method_does_not_mean_that_the_peer_is_lost(serve: Serve) -> None:
    async with serve(Servicer(AssertionError("never reached"))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/test.Test/Other")(b"", timeout=DEADLINE_S)
    assert type(from_rpc_error(raised.value, "peer")) is MeshError


async def test_nobody_there_means_that_the_peer_is_lost(tmp_path: Path) -> None:
    options = channel_options(max_send_bytes=LIMIT, max_receive_bytes=LIMIT)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/none", options=options) as channel:
        assert type(await call(channel, "unary", Tensor())) is WorkerLost


async def test_cancelling_a_stream_ends_its_servicer(serve: Serve) -> None:
    servicer = Servicer(AssertionError("never reached"))
    async with serve(servicer) as channel:
        under_way = method(channel, "stream")(Tensor(data=b"1"), timeout=DEADLINE_S)
        assert (await under_way.read()).shape == [1]
        under_way.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await servicer.ended.wait()


class Recording:
    """A guard that notes who enters and leaves, and refuses all if told so."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.seen: list[str] = []
        self.left = asyncio.Event()

    @contextmanager
    def __call__(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        assert context.peer()
        self.seen.append(f"enter {method}")
        if self.refuses:
            raise Forbidden("not you")
        try:
            yield
        finally:
            self.seen.append(f"leave {method}")
            self.left.set()


@KINDS
async def test_a_guard_is_around_each_call_however_it_ends(serve: Serve, kind: str) -> None:
    guard = Recording()
    async with serve(Servicer(QueueFull("full")), guard) as channel:
        assert type(await call(channel, kind, Tensor())) is QueueFull
    path = f"/test.Test/{kind.capitalize()}"
    assert guard.seen == [f"enter {path}", f"leave {path}"]


@KINDS
async def test_whom_the_guard_refuses_learns_nothing_else(serve: Serve, kind: str) -> None:
    guard = Recording(refuses=True)
    async with serve(Servicer(AssertionError("never reached")), guard) as channel:
        # Streams are not written to: a write may find the call ended already.
        sent = () if kind in {"bidi", "collect"} else (INVALID,)
        under_way = method(channel, kind)(*sent, timeout=DEADLINE_S)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (under_way if isinstance(under_way, Awaitable) else under_way.read())
    arrived = from_rpc_error(raised.value, "peer")
    assert type(arrived) is Forbidden
    assert str(arrived) == "peer: not you"
    assert guard.seen == [f"enter /test.Test/{kind.capitalize()}"]


async def test_a_guard_is_left_when_the_caller_goes(serve: Serve) -> None:
    guard, servicer = Recording(), Servicer(AssertionError("never reached"))
    async with serve(servicer, guard) as channel:
        under_way = method(channel, "stream")(Tensor(data=b"1"), timeout=DEADLINE_S)
        await under_way.read()
        assert guard.seen == ["enter /test.Test/Stream"]
        under_way.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await guard.left.wait()
    assert guard.seen[1] == "leave /test.Test/Stream"
