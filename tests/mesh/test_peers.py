"""Workers that die, refuse, lie or are of another version: one clear error or a recovery, never a wrong token, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import torch

from coordinator.config import ModelSettings, ServeSettings
from protos import generation_pb2, shardworker_pb2, shardworker_pb2_grpc
from protos.errors import InvalidArgument, MeshError, NotServing, ProtocolMismatch, TopologyError, WorkerLost
from protos.rpc import PROTOCOL_VERSION
from shardworker.app import RunningWorker, start_worker
from shardworker.shard import Shard
from shardworker.source import Folder
from tests.mesh.conftest import Mesh, MeshMaker, start_coordinator

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("glm4_moe")


def _settings(checkpoint: Path, tmp_path: Path, workers: list[str], **more: object) -> ServeSettings:
    return ServeSettings(
        model=ModelSettings(str(checkpoint), dtype="f32", wire="f32"), listen=f"unix:{tmp_path}/c", workers=tuple(workers), **more
    )


class _FakeWorker(shardworker_pb2_grpc.ShardWorkerServicer):
    """Describes itself, and fails to load in some way."""

    def __init__(self, version: int, load: str) -> None:
        self.version = version
        self.load = load
        self.silent = asyncio.Event()

    async def Describe(self, request: object, context: object) -> shardworker_pb2.DescribeResponse:  # noqa: ARG002, N802
        return shardworker_pb2.DescribeResponse(
            protocol_version=self.version,
            version="9.9",
            held=shardworker_pb2.Held(state=shardworker_pb2.WORKER_STATE_EMPTY),
            device="cpu",
            memory_total_bytes=2**34,
            memory_free_bytes=2**34,
        )

    async def Load(  # noqa: N802
        self, request: shardworker_pb2.LoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[shardworker_pb2.LoadResponse]:
        del request
        yield shardworker_pb2.LoadResponse(progress=shardworker_pb2.LoadProgress(loaded_bytes=1, total_bytes=2))
        if self.load == "dies":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        elif self.load == "silent":
            await self.silent.wait()


async def _serve_fake(fake: _FakeWorker, path: Path) -> grpc.aio.Server:
    server = grpc.aio.server()
    shardworker_pb2_grpc.add_ShardWorkerServicer_to_server(fake, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


@pytest.mark.parametrize(
    ("version", "load", "error", "message"),
    [
        (PROTOCOL_VERSION + 1, "", ProtocolMismatch, rf"shardmesh 9\.9\) speaks protocol {PROTOCOL_VERSION + 1},"),
        (PROTOCOL_VERSION, "dies", WorkerLost, r"worker unix:.*Socket closed"),
        (PROTOCOL_VERSION, "ends", WorkerLost, r"ended loading without an answer"),
        (PROTOCOL_VERSION, "silent", WorkerLost, r"no progress of loading for 0\.3 s"),
    ],
    ids=["version", "dies", "ends", "silent"],
)
async def test_a_worker_that_cannot_load_ends_the_start(  # noqa: PLR0917  # fixtures and parameters
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    load: str,
    error: type[MeshError],
    message: str,
) -> None:
    monkeypatch.setattr("protos.rpc.LOAD_SILENCE_S", 0.3)
    worker = _FakeWorker(version, load)
    server = await _serve_fake(worker, tmp_path / "w")
    try:
        with pytest.raises(error, match=message):
            await start_coordinator(_settings(checkpoint, tmp_path, [f"unix:{tmp_path}/w"]))
    finally:
        worker.silent.set()
        await server.stop(0)


async def test_a_worker_that_is_not_there_ends_the_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protos.rpc.DESCRIBE_DEADLINE_S", 0.5)
    with pytest.raises(WorkerLost, match=r"worker unix:.*/w"):
        await start_coordinator(_settings(checkpoint, tmp_path, [f"unix:{tmp_path}/w"]))


async def test_too_many_shards_name_the_rule(checkpoint: Path, tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/{number}" for number in range(9)]
    workers = [await start_worker(address, device="cpu", threads=1) for address in addresses]
    try:
        with pytest.raises(TopologyError, match="8"):
            await start_coordinator(_settings(checkpoint, tmp_path, addresses, shards=9))
    finally:
        for worker in workers:
            await worker.stop(0)


async def test_an_address_in_use_is_said_before_anything_loads(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1) as running:
        settings = ServeSettings(
            model=ModelSettings(str(checkpoint)), listen=running.coordinator.address, workers=(running.workers[0].address,)
        )
        with pytest.raises(InvalidArgument, match="the address is in use"):
            await start_coordinator(settings)
        # The mesh in place did not notice.
        assert len((await running.generate(PROMPT, 4)).tokens) == 4


async def test_a_lost_worker_is_replaced_by_a_spare_and_no_token_changes(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 2, spares=1) as running:
        expected = (await running.generate(PROMPT, 60)).tokens
        seeded = {"temperature": 0.8, "seed": 3}
        expected_seeded = (await running.generate(PROMPT, 60, sampling=seeded)).tokens
        streams = [
            asyncio.create_task(running.generate(PROMPT, 60)),
            asyncio.create_task(running.generate(PROMPT, 60, sampling=seeded)),
        ]
        await _wait_steps(running, 130)
        lost = running.workers[1]
        await lost.stop(0)
        results = [await stream for stream in streams]
        assert [result.tokens for result in results] == [expected, expected_seeded]
        assert [result.finished.usage.completion_tokens for result in results] == [60, 60]  # type: ignore[union-attr]
        mesh_now = await running.client.mesh()
        serving = {worker.address for worker in mesh_now.workers if worker.serving}
        assert serving == {running.workers[0].address, running.workers[2].address}
        assert mesh_now.epoch == 2


async def _wait_steps(running: Mesh, steps: int) -> None:
    # The engine has no event for every step.
    while running.coordinator._status.engine.statistics.steps < steps:  # type: ignore[union-attr]  # noqa: ASYNC110
        await asyncio.sleep(0)  # the engine has no event for every step


async def test_a_worker_lost_for_good_ends_the_stream_with_one_error(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 2, recovery_s=0.0) as running:
        stream = running.client.generate(
            generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), max_tokens=400, ignore_eos=True)
        )
        received = 0
        async for response in stream:
            received += len(response.delta.token_ids)
            if received == 5:
                break
        await running.workers[1].stop(0)
        with pytest.raises(NotServing, match=r"no full mesh: .*worker"):
            [response async for response in stream]
        with pytest.raises(NotServing):
            await running.generate(PROMPT, 4)


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunningWorker, float], None]:
    """`lying(worker, value)`: one of that worker's layers answers with that value from now on."""
    honest = Shard.feed_forward
    liars: dict[int, float] = {}

    def feed_forward(self: Shard, layer: int, *arguments: object) -> torch.Tensor:
        result = honest(self, layer, *arguments)  # type: ignore[arg-type]
        return result.fill_(liars[id(self)]) if layer == 1 and id(self) in liars else result

    def lie(worker: RunningWorker, value: float) -> None:
        holding = worker._holding
        liars[id(holding.check_plan(holding.held().plan_digest))] = value

    monkeypatch.setattr(Shard, "feed_forward", feed_forward)
    return lie


async def test_a_partial_that_is_not_finite_never_becomes_a_token(
    checkpoint: Path, mesh: MeshMaker, lying: Callable[[RunningWorker, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mesh(checkpoint, 2, recovery_s=1.0) as running:
        expected = (await running.generate(PROMPT, 4)).tokens
        lying(running.workers[1], float("nan"))
        with pytest.raises(NotServing, match=r"no full mesh: the partials of shards \[1\] sum to NaN or infinity"):
            await running.generate(PROMPT, 4)
        monkeypatch.undo()
        await _until(running, lambda found: found.serving)
        assert (await running.generate(PROMPT, 4)).tokens == expected


@pytest.mark.parametrize("value", [float("nan"), 3.0], ids=["NaN", "finite"])
async def test_a_worker_that_lies_is_passed_over_where_there_is_a_spare(
    checkpoint: Path,
    mesh: MeshMaker,
    lying: Callable[[RunningWorker, float], None],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    monkeypatch.setattr("protos.rpc.CANARY_S", 0.05)
    async with mesh(checkpoint, 2, spares=1) as running:
        expected = (await running.generate(PROMPT, 8)).tokens
        lying(running.workers[1], value)
        # What is finite and wrong only the canary finds: nobody asks meanwhile.
        await _until(running, lambda found: found.recovery.recoveries == 1 and found.serving)
        assert (await running.generate(PROMPT, 8)).tokens == expected
        found = await running.client.mesh()
        assert [worker.address for worker in found.workers if not worker.serving] == [running.workers[1].address]
        assert dict(found.recovery.failures) == {"WRONG_RESULT": 1}


async def test_a_worker_that_is_lost_while_nobody_asks_is_replaced_at_once(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 2, spares=1) as running:
        expected = (await running.generate(PROMPT, 8)).tokens
        await running.workers[0].stop(0)
        await _until(running, lambda found: found.recovery.recoveries == 1 and found.serving)
        assert (await running.generate(PROMPT, 8)).tokens == expected


async def test_spares_are_warmed_and_one_without_the_files_is_named(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warmed: list[int] = []
    honest = Folder.warm
    monkeypatch.setattr(Folder, "warm", lambda self: warmed.append(honest(self)) or warmed[-1])
    async with mesh(checkpoint, 1, spares=2, warm_spares=True) as running:
        await _until(running, lambda _: len(warmed) == 2)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        assert warmed == [size, size]
        assert (await running.client.mesh()).workers[1].weights_bytes == 0
        coordinator = running.coordinator
        plan, fanout = coordinator._status.plan, coordinator._status.fanout  # type: ignore[union-attr]
        await coordinator._warmer.warm(plan, checkpoint / "nowhere", fanout.addresses)  # type: ignore[union-attr]
    assert capsys.readouterr().out.count("spare cannot be warmed") == 2


async def test_a_session_that_is_silent_ends_by_its_lease_and_its_memory_is_free(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protos.rpc.lease_s", lambda *_: 0.2)
    monkeypatch.setattr("protos.rpc.CANARY_S", 0.05)
    async with mesh(checkpoint, 1) as running:
        # A coordinator that is alive sends signs of life.
        await asyncio.sleep(0.5)
        assert (await running.client.mesh()).recovery.recoveries == 0
        # One that hangs does not.
        monkeypatch.setattr("coordinator.engine.Engine._prove", lambda *_: asyncio.Event().wait())
        await _until(running, lambda found: found.workers[0].kv_bytes == 0)


async def _until(running: Mesh, true: Callable[[generation_pb2.GetMeshResponse], bool]) -> None:
    async with asyncio.timeout(30):
        while not true(await running.client.mesh()):  # noqa: ASYNC110  # a caller can only ask
            await asyncio.sleep(0.02)


async def test_a_message_over_the_limit_is_refused_and_the_next_call_works(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1) as running:
        with pytest.raises(MeshError, match=r"larger than max"):
            await running.generate([5] * 5_000_000, 4)
        assert len((await running.generate(PROMPT, 4)).tokens) == 4


async def test_a_caller_that_vanishes_leaves_nothing(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1) as running:
        channel = grpc.aio.insecure_channel(running.coordinator.address)
        call = channel.unary_stream("/shardmesh.v1.Generation/Generate")(
            generation_pb2.GenerateRequest(
                token_ids=generation_pb2.TokenIds(ids=PROMPT), max_tokens=400, ignore_eos=True
            ).SerializeToString()
        )
        await call.read()
        await channel.close()
        engine = running.coordinator._status.engine  # type: ignore[union-attr]
        await asyncio.wait_for(engine.wait_idle(), 10)
        assert engine.scheduler.pool.num_used == 0


async def test_two_coordinators_share_workers_without_seeing_each_other(
    checkpoint: Path, mesh: MeshMaker, tmp_path: Path
) -> None:
    async with mesh(checkpoint, 2) as running:
        expected = (await running.generate(PROMPT, 30)).tokens
        settings = _settings(checkpoint, tmp_path, [worker.address for worker in running.workers], shards=2)
        second = await start_coordinator(settings)
        try:
            async with Mesh.connect(second, running.workers) as other:
                results = await asyncio.gather(*(one.generate(PROMPT, 30) for one in (running, other) for _ in range(3)))
            assert [result.tokens for result in results] == [expected] * 6
        finally:
            await second.stop(0)
        assert (await running.generate(PROMPT, 30)).tokens == expected


async def test_rows_that_no_message_could_take_are_refused_at_the_start(checkpoint: Path, mesh: MeshMaker) -> None:
    with pytest.raises(TopologyError, match=r"--max-rows is 100000, but a message to a worker takes at most \d+ rows of 128"):
        async with mesh(checkpoint, 1, max_rows=100_000):
            pass


async def test_the_largest_step_fits_and_hurts_no_neighbour(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Messages as small as they may be for 64 rows, and logits of one row at a time.
    monkeypatch.setattr("protos.rpc.MAX_WORKER_REQUEST_BYTES", 2**20 + 64 * (512 + 1024))
    monkeypatch.setattr("coordinator.head.REPLY_BYTES", 4 * 512)
    penalized = {"repetition_penalty": 1.3}
    async with mesh(checkpoint, 2, max_rows=64) as running:
        prompts = [[5 + row] * 200 for row in range(4)]
        expected = [(await running.generate(prompt, 8, sampling=penalized)).tokens for prompt in prompts]
        together = await asyncio.gather(*(running.generate(prompt, 8, sampling=penalized) for prompt in prompts))
        assert [result.tokens for result in together] == expected
        assert (await running.client.mesh()).epoch == 1


async def test_a_drain_lets_streams_finish_and_ends_the_rest_with_a_status(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1) as running:
        short = asyncio.create_task(running.generate(PROMPT, 30))
        endless = asyncio.create_task(running.generate(PROMPT, 500))
        await _wait_steps(running, 3)
        stopping = asyncio.create_task(running.coordinator.stop(1.0))
        assert len((await short).tokens) == 30
        with pytest.raises(NotServing, match="the coordinator is shutting down"):
            await endless
        await stopping
        assert not Path(running.coordinator.address.removeprefix("unix:")).exists()
