"""Raw bytes through real gRPC over unix sockets: what is no message, metadata that is garbage, and what is not even HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from typing import TYPE_CHECKING

import grpc
import pytest

from coordinator.app import Coordinator
from coordinator.config import ModelSettings, ServeSettings
from coordinator.served_model import ServedModel
from protos.generation_pb2 import GenerateRequest, TokenIds
from protos.generation_pb2_grpc import GenerationStub
from protos.shardworker_pb2 import DescribeRequest
from protos.shardworker_pb2_grpc import ShardWorkerStub
from shardworker.app import RunningWorker, start_worker
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.stack import load_request, make_model
from tests.fuzz.test_callers import sound_requests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GENERATION, WORKER = "/shardmesh.v1.Generation/", "/shardmesh.v1.ShardWorker/"
CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Wire:
    """A worker and a coordinator with sockets of their own."""

    def __init__(self, worker: RunningWorker, coordinator: Coordinator, model: ServedModel) -> None:
        self.worker, self.coordinator = worker, coordinator
        self.plan = model.plan(1, 16)
        self.channels = {
            GENERATION: grpc.aio.insecure_channel(coordinator.address),
            WORKER: grpc.aio.insecure_channel(worker.address),
        }
        self.load = load_request(self.plan, 0, model.directory).SerializeToString()
        self.good = GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), max_tokens=3, ignore_eos=True)
        self.tokens: list[int] = []
        self.examples = 0

    async def good_tokens(self) -> list[int]:
        stub = GenerationStub(self.channels[GENERATION])
        responses = [response async for response in stub.Generate(self.good, timeout=10)]
        return [token for response in responses for token in response.delta.token_ids]

    async def check_next_is_served(self) -> None:
        self.examples += 1
        if self.examples % 20 == 0:
            assert await self.good_tokens() == self.tokens
            assert (await ShardWorkerStub(self.channels[WORKER]).Describe(DescribeRequest(), timeout=10)).held.shard == 0

    async def stop(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        await self.coordinator.stop(0)
        await self.worker.stop(0)


@pytest.fixture(scope="module")
def wire(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    directory: Path = tmp_path_factory.mktemp("wire")
    (directory / "model").mkdir()
    make_model("qwen3_moe", directory / "model")

    async def start() -> Wire:
        settings = ModelSettings(str(directory / "model"), dtype="f32", wire="f32")
        worker = await start_worker(f"unix:{directory}/w", device="cpu", threads=1)
        model = ServedModel.open(settings)
        serving = ServeSettings(model=settings, listen=f"unix:{directory}/c", workers=(worker.address,), kv_tokens=1024)
        one = Wire(worker, await Coordinator.start(serving, model, lambda _: None), model)
        one.tokens = await one.good_tokens()
        return one

    one = runner.run(start())
    yield one
    runner.run(one.stop())


def metadata(random: Random) -> list[tuple[str, str | bytes]]:
    """What gRPC's own client lets pass; the server's limit is 8 KiB."""
    pairs: list[tuple[str, str | bytes]] = [
        ("x-bin", random.randbytes(random.choice((0, 1, 100)))),
        ("authorization", random.choice(("Bearer x", "", "Basic " + "A" * 1000))),
        ("traceparent", random.choice(("00-" + "f" * 32 + "-" + "1" * 16 + "-01", "x" * 500, ""))),
        ("x-request-id", "x" * random.choice((0, 10, 9000, 70000))),
        ("grpc-previous-rpc-attempts-x", "9" * 50),
    ]
    return random.choices(pairs, k=random.choice((0, 0, 1, 3, 50)))


async def call(
    channel: grpc.aio.Channel, method: str, bodies: list[bytes], pairs: list[tuple[str, str | bytes]]
) -> grpc.StatusCode:
    """Send bodies as a stream, whatever the method expects; reads what comes, to its end."""
    stream = channel.stream_stream(method, request_serializer=None, response_deserializer=None)(timeout=20, metadata=pairs)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for body in bodies:
            await stream.write(body)
        await stream.done_writing()
    with contextlib.suppress(grpc.aio.AioRpcError):
        for _ in range(20):
            if await stream.read() is grpc.aio.EOF:
                break
        else:
            stream.cancel()
            return grpc.StatusCode.OK
    code: grpc.StatusCode = await stream.code()
    if code is grpc.StatusCode.INTERNAL and await stream.details() == "Internal error from Core":
        # gRPC's own client says so where it writes to a call that the server has just ended.
        return grpc.StatusCode.INVALID_ARGUMENT
    return code


@fuzz(0.01)
def test_any_bytes_get_a_status(wire: Wire, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    service = random.choice((GENERATION, WORKER))
    names = {
        GENERATION: ("Generate", "Generate", "GetModel", "GetMesh", "x"),
        WORKER: ("Execute", "Load", "Describe", "Release", "Warm", ""),
    }
    method = service + random.choice(names[service])
    sound = [*(request.SerializeToString() for request in sound_requests()), wire.load, b"", random.randbytes(50)]
    count = random.choice((0, 1, 2, 3)) if method.endswith("Execute") else 1
    bodies = [body if random.random() < 0.2 else mutate_bytes(random, body) for body in random.choices(sound, k=count)]
    if method.endswith("Load"):
        # What is loaded must stay: only what is no plan of ours may come.
        bodies = [random.randbytes(random.randrange(200)) for _ in bodies]

    async def run() -> None:
        with watched():
            code = await call(wire.channels[service], method, bodies, metadata(random))
        sent[f"wire, {method.removeprefix('/shardmesh.v1.')}: {code.name}"] += len(bodies)
        assert code in CODES, (method, code)
        await wire.check_next_is_served()

    runner.run(run())


def frames(random: Random) -> bytes:
    """HTTP/2 frames with lengths, kinds, flags and streams that are mostly wrong."""
    result = b""
    for _ in range(random.randrange(6)):
        payload = random.randbytes(random.choice((0, 4, 5, 6, 8, 9, 100)))
        length = len(payload) if random.random() < 0.8 else random.randrange(2**24)
        stream = random.choice((0, 1, 1, 3, 2**31 - 1))
        result += (
            length.to_bytes(3, "big") + bytes((random.randrange(12), random.randrange(256))) + stream.to_bytes(4, "big") + payload
        )
    return result


@fuzz(0.005)
def test_what_is_not_http2_hurts_nobody(wire: Wire, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    address = random.choice((wire.worker.address, wire.coordinator.address)).removeprefix("unix:")
    data = random.choice((random.randbytes(random.randrange(500)), PREFACE + frames(random), PREFACE[: random.randrange(24)]))

    async def run() -> None:
        with watched():
            reader, writer = await asyncio.open_unix_connection(address)
            writer.write(data)
            with contextlib.suppress(OSError, TimeoutError):
                await writer.drain()
                async with asyncio.timeout(0.01):
                    await reader.read(1000)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        sent["wire: garbage"] += 1
        await wire.check_next_is_served()

    runner.run(run())


@pytest.mark.parametrize("method", [GENERATION + "GetModel", GENERATION + "Generate", WORKER + "Describe", WORKER + "Load"])
def test_a_call_without_its_message_is_refused(wire: Wire, runner: asyncio.Runner, method: str) -> None:
    service = GENERATION if method.startswith(GENERATION) else WORKER
    assert runner.run(call(wire.channels[service], method, [], [])) is grpc.StatusCode.INVALID_ARGUMENT
    assert runner.run(wire.good_tokens()) == wire.tokens
