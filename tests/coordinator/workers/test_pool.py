"""Workers, real gRPC, that answer as they are told: who is asked what, and what each failure becomes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from coordinator.planning.placement import Placement, WorkerReport
from coordinator.workers import roster as roster_module
from coordinator.workers.assignment import choose_assignment
from coordinator.workers.client import WorkerClient
from coordinator.workers.loading import LoadEvent
from coordinator.workers.pool import WorkerPool
from protos import rpc
from protos.errors import MeshError, ModelError, NotServing, OutOfMemory, PlanMismatch, ProtocolMismatch, StaleEpoch, WorkerLost
from protos.interceptors import ErrorInterceptor
from protos.plan_pb2 import ShardPlan
from protos.shardworker_pb2 import (
    WORKER_STATE_EMPTY,
    WORKER_STATE_LOADED,
    DescribeResponse,
    ExecuteRequest,
    ExecuteResponse,
    FormerPlan,
    Held,
    Loaded,
    LoadProgress,
    LoadRequest,
    LoadResponse,
    Opened,
    ReleaseRequest,
    ReleaseResponse,
    WorkerState,
)
from protos.shardworker_pb2_grpc import ShardWorkerServicer, add_ShardWorkerServicer_to_server

DIGEST = b"p" * 32


def plan_of(num_shards: int, digest: bytes = DIGEST) -> Any:
    return SimpleNamespace(
        shards=tuple(ShardPlan(shard=shard, num_shards=num_shards, page_tokens=16) for shard in range(num_shards)),
        shard_digests=tuple(bytes([shard]) * 32 for shard in range(num_shards)),
        digest=digest,
        weight_bytes=(100,) * num_shards,
        kv_bytes_per_token=(10,) * num_shards,
    )


def held(shard: int, assignment: int, *, digest: bytes = DIGEST, state: WorkerState = WORKER_STATE_LOADED) -> Held:
    return Held(state=state, plan_digest=digest, shard=shard, assignment=assignment)


def report(address: str, state: Held) -> WorkerReport:
    return WorkerReport(address, DescribeResponse(held=state))


@pytest.mark.parametrize(
    ("states", "assignment"),
    [
        ([Held(), Held()], 1),
        ([held(0, 4), held(1, 4)], 4),
        ([held(0, 4), held(1, 3)], 4),
        ([held(0, 4), Held(assignment=9)], 10),
        ([held(1, 4), held(0, 4)], 5),
        ([held(0, 4), held(1, 4, digest=b"x" * 32)], 5),
        ([held(0, 4), held(1, 4, state=WORKER_STATE_EMPTY)], 5),
        ([held(0, 4), held(1, 4), Held(assignment=7)], 7),
        ([held(0, 4), held(0, 4), held(1, 8)], 9),
    ],
)
def test_assignment_is_kept_by_a_complete_mesh_and_rises_otherwise(states: list[Held], assignment: int) -> None:
    reports = [report(f"w{number}", state) for number, state in enumerate(states)]
    placement = Placement(("w0", "w1"), tuple(one.address for one in reports[2:]))
    assert choose_assignment(plan_of(2), placement, reports) == assignment


class FakeWorker(ShardWorkerServicer):
    """Loads anything, opens any session; `on_load` and `on_execute` may spoil it."""

    def __init__(self) -> None:
        self.description = DescribeResponse(protocol_version=rpc.PROTOCOL_VERSION, version="1", memory_free_bytes=10**9)
        self.loads: list[LoadRequest] = []
        self.executes: list[ExecuteRequest] = []
        self.released: list[int] = []
        self.sessions_open = 0
        self.session_ended = asyncio.Event()
        self.load_cancelled = asyncio.Event()
        self.idle_progress_s = 0.0
        self.on_describe: Callable[[], Any] = lambda: None
        self.on_load: Callable[[], Any] = lambda: None
        self.on_execute: Callable[[ExecuteRequest, grpc.aio.ServicerContext], Any] = lambda *_: None

    async def Describe(self, message: Any, context: Any) -> DescribeResponse:  # noqa: N802
        del message, context
        if waiting := self.on_describe():
            await waiting
        return self.description

    async def Load(self, message: LoadRequest, context: Any) -> AsyncIterator[LoadResponse]:  # noqa: N802
        del context
        self.loads.append(message)
        yield LoadResponse(progress=LoadProgress(loaded_bytes=50, total_bytes=100))
        while self.idle_progress_s:
            await asyncio.sleep(self.idle_progress_s)
            yield LoadResponse(progress=LoadProgress(loaded_bytes=50, total_bytes=100))
        try:
            if waiting := self.on_load():
                await waiting
        except asyncio.CancelledError:
            self.load_cancelled.set()
            raise
        yield LoadResponse(loaded=Loaded(weights_bytes=100))

    async def Release(self, message: ReleaseRequest, context: Any) -> ReleaseResponse:  # noqa: N802
        del context
        self.released.append(message.assignment)
        return ReleaseResponse()

    async def Execute(self, messages: AsyncIterator[ExecuteRequest], context: Any) -> AsyncIterator[ExecuteResponse]:  # noqa: N802
        self.sessions_open += 1
        try:
            async for message in messages:
                self.executes.append(message)
                if waiting := self.on_execute(message, context):
                    await waiting
                shard = self.loads[-1].plan.shard
                yield ExecuteResponse(round=message.round, epoch=message.epoch, shard=shard, opened=Opened())
        finally:
            self.sessions_open -= 1
            self.session_ended.set()


Cluster = Callable[[int], contextlib.AbstractAsyncContextManager[tuple[WorkerPool, list[FakeWorker]]]]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    @contextlib.asynccontextmanager
    async def make(count: int) -> AsyncIterator[tuple[WorkerPool, list[FakeWorker]]]:
        async with contextlib.AsyncExitStack() as stack:
            workers = [FakeWorker() for _ in range(count)]
            for number, worker in enumerate(workers):
                server = grpc.aio.server(interceptors=[ErrorInterceptor()])
                add_ShardWorkerServicer_to_server(worker, server)
                server.add_insecure_port(f"unix:{tmp_path}/{number}")
                await server.start()
                stack.push_async_callback(server.stop, 0)
            pool = WorkerPool([f"unix:{tmp_path}/{number}" for number in range(count)])
            stack.push_async_callback(pool.close)
            yield pool, workers

    return make


async def assemble(pool: WorkerPool, shards: int = 2, events: list[LoadEvent] | None = None) -> Any:
    async with asyncio.timeout(20):
        return await pool.assemble(plan_of(shards), Path("/model"), 12, (events if events is not None else []).append)


async def test_mesh_is_loaded_and_opened_with_everything_that_it_needs(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):
        events: list[LoadEvent] = []
        fanout = await assemble(pool, 2, events)
        assert fanout.addresses == tuple(pool.clients)[:2]
        assert (fanout.epoch, fanout.plan_digest) == (1, DIGEST)
        for shard, worker in enumerate(workers[:2]):
            request = worker.loads[0]
            assert (request.plan.shard, request.assignment, request.directory) == (shard, 1, "/model")
            assert request.protocol_version == rpc.PROTOCOL_VERSION
            assert list(request.shard_digests) == [b"\0" * 32, b"\1" * 32]
            opened = worker.executes[0]
            assert (opened.open.num_pages, opened.epoch, opened.round, opened.plan_digest) == (12, 1, 1, DIGEST)
            address = fanout.addresses[shard]
            assert [event for event in events if event.shard == shard] == [
                LoadEvent(shard, address, 50, 100),
                LoadEvent(shard, address, 100, 100),
            ]
        assert not workers[2].loads
        assert len({worker.executes[0].open.coordinator for worker in workers[:2]}) == 1
        fanout.close()
        await asyncio.wait_for(workers[0].session_ended.wait(), 5)
        assert (await assemble(pool)).epoch == 2


async def test_worker_of_another_version_is_passed_over(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):
        workers[0].description.protocol_version = rpc.PROTOCOL_VERSION + 1
        fanout = await assemble(pool)
        assert fanout.addresses == tuple(pool.clients)[1:]
        survey = await pool.survey(wait_for_ready=True)
        assert isinstance(survey.failures[next(iter(pool.clients))], ProtocolMismatch)
        fanout.close()
    async with cluster(2) as (pool, workers):
        workers[1].description.protocol_version = rpc.PROTOCOL_VERSION + 1
        with pytest.raises(ProtocolMismatch, match="run the same version on both"):
            await assemble(pool)


@pytest.mark.parametrize("error", [ModelError("files differ"), OutOfMemory("too big"), StaleEpoch("assignment 3 is lower")])
async def test_refused_load_is_the_workers_error_and_the_other_load_is_cancelled(cluster: Cluster, error: MeshError) -> None:
    async with cluster(2) as (pool, workers):
        workers[0].on_load = lambda: asyncio.Event().wait()

        async def refuse() -> None:
            raise error

        workers[1].on_load = refuse
        with pytest.raises(type(error), match=f"worker {list(pool.clients)[1]}: {error}"):
            await assemble(pool)
        await asyncio.wait_for(workers[0].load_cancelled.wait(), 5)
        assert not workers[0].executes


async def test_the_others_load_to_the_end_when_a_worker_is_lost(cluster: Cluster) -> None:
    async with cluster(2) as (pool, workers):
        gate = asyncio.Event()

        async def die() -> None:
            # Only when the failure was seen may the other one go on.
            asyncio.get_running_loop().call_later(0.05, gate.set)
            raise WorkerLost("Socket closed")

        workers[0].on_load = gate.wait
        workers[1].on_load = die
        events: list[LoadEvent] = []
        with pytest.raises(WorkerLost, match="Socket closed"):
            await assemble(pool, 2, events)
        first = next(iter(pool.clients))
        assert LoadEvent(0, first, 100, 100) in events
        assert not workers[0].load_cancelled.is_set()
        assert not workers[0].executes


async def test_load_without_progress_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "LOAD_SILENCE_S", 0.05)
    async with cluster(1) as (pool, workers):
        workers[0].on_load = lambda: asyncio.Event().wait()
        with pytest.raises(WorkerLost, match=r"no progress of loading for 0\.05 s"):
            await assemble(pool, 1)
        await asyncio.wait_for(workers[0].load_cancelled.wait(), 5)


async def test_load_that_tells_of_itself_and_gets_nowhere_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "LOAD_STALL_S", 0.05)
    async with cluster(1) as (pool, workers):
        workers[0].idle_progress_s = 0.01
        with pytest.raises(WorkerLost, match="is stuck at 50 of 100 bytes of weights"):
            await assemble(pool, 1)


async def test_whoever_failed_is_passed_over_while_others_suffice(cluster: Cluster) -> None:
    async with cluster(3) as (pool, _):
        first, second, third = pool.clients
        pool.blame(WorkerLost("hangs"), [second])
        fanout = await assemble(pool)
        assert fanout.addresses == (first, third)
        fanout.close()
        # Too few are beyond doubt: whoever failed longest ago comes back.
        pool.blame(WorkerLost("hangs"), [first])
        pool.blame(WorkerLost("hangs"), [third])
        fanout = await assemble(pool)
        assert set(fanout.addresses) == {first, second}
        fanout.close()


async def test_a_refusal_is_nobodys_failure(cluster: Cluster) -> None:
    async with cluster(3) as (pool, _):
        for error in (StaleEpoch("old"), PlanMismatch("other")):
            pool.blame(error, list(pool.clients)[:1])
        fanout = await assemble(pool)
        assert fanout.addresses == tuple(pool.clients)[:2]
        fanout.close()


async def test_a_worker_whose_load_fails_is_passed_over_the_next_time(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):

        async def refuse() -> None:
            raise ModelError("no such folder")

        workers[0].on_load = refuse
        with pytest.raises(ModelError):
            await assemble(pool)
        fanout = await assemble(pool)
        assert fanout.addresses == tuple(pool.clients)[1:]
        fanout.close()


async def test_a_worker_that_does_not_answer_holds_up_a_mesh_of_the_others_for_a_moment_only(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "SETTLE_S", 0.01)
    async with cluster(3) as (pool, workers):
        workers[0].on_describe = lambda: asyncio.Event().wait()
        fanout = await assemble(pool)
        assert fanout.addresses == tuple(pool.clients)[1:]
        fanout.close()


async def test_refused_open_closes_all_sessions(cluster: Cluster) -> None:
    async with cluster(2) as (pool, workers):

        async def refuse() -> None:
            raise StaleEpoch("epoch 1 is over")

        workers[1].on_execute = lambda *_: refuse()
        with pytest.raises(StaleEpoch, match="epoch 1 is over"):
            await assemble(pool)
        await asyncio.wait_for(workers[0].session_ended.wait(), 5)
        assert workers[0].sessions_open == 0


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN])
async def test_session_ended_by_the_worker_is_a_lost_worker_and_never_a_cancellation(
    cluster: Cluster, code: grpc.StatusCode
) -> None:
    async with cluster(1) as (pool, workers):
        fanout = await assemble(pool, 1)
        workers[0].on_execute = lambda _, context: context.abort(code, "going down")
        with pytest.raises(WorkerLost, match="going down"):
            await fanout.round(ExecuteRequest(step=1), "partial", 1)
        # And again, on the broken stream.
        with pytest.raises(WorkerLost):
            await fanout.round(ExecuteRequest(step=1), "partial", 1)


async def test_closed_session_answers_no_more(cluster: Cluster) -> None:
    async with cluster(1) as (pool, workers):
        fanout = await assemble(pool, 1)
        fanout.close()
        await asyncio.wait_for(workers[0].session_ended.wait(), 5)
        with pytest.raises((WorkerLost, asyncio.CancelledError)):
            await fanout.round(ExecuteRequest(step=1), "partial", 1)
        assert len(workers[0].executes) == 1


async def test_worker_that_does_not_listen_is_a_failure_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool([f"unix:{tmp_path}/nobody"])
    survey = await pool.survey(wait_for_ready=False)
    assert survey.reports == ()
    failure = survey.failures[f"unix:{tmp_path}/nobody"]
    assert isinstance(failure, WorkerLost)
    assert f"worker unix:{tmp_path}/nobody" in str(failure)
    monkeypatch.setattr(rpc, "DESCRIBE_DEADLINE_S", 0.05)
    survey = await pool.survey(wait_for_ready=True)
    assert isinstance(survey.failures[f"unix:{tmp_path}/nobody"], WorkerLost)
    await pool.close()


async def test_client_is_a_context(cluster: Cluster) -> None:
    async with cluster(1) as (pool, _), WorkerClient(next(iter(pool.clients))) as client:
        assert (await client.describe(wait_for_ready=True)).version == "1"


def addresses_of(pool: WorkerPool) -> list[str]:
    return list(pool.clients)


async def test_newcomers_are_asked_and_those_that_went_away_no_more(cluster: Cluster) -> None:
    async with cluster(3) as (pool, _):
        first, second, third = addresses_of(pool)
        pool.follow([first])
        assert [report.address for report in (await pool.survey(wait_for_ready=False)).reports] == [first]
        kept = pool.clients[first]
        pool.follow([third, first, second])
        assert [report.address for report in (await pool.survey(wait_for_ready=False)).reports] == [third, first, second]
        assert pool.clients[first] is kept
        pool.follow([])
        with pytest.raises(NotServing, match="2 shards need 2 workers, found 0: waiting for more"):
            await assemble(pool)


async def test_a_worker_that_goes_away_while_it_is_asked_is_left_out(cluster: Cluster) -> None:
    async with cluster(2) as (pool, workers):
        first, second = addresses_of(pool)
        asked = asyncio.Event()

        async def hang() -> None:
            asked.set()
            await asyncio.Event().wait()

        workers[0].on_describe = hang
        surveying = asyncio.create_task(pool.survey(wait_for_ready=False))
        await asked.wait()
        pool.follow([second])
        survey = await asyncio.wait_for(surveying, 5)
        assert [report.address for report in survey.reports] == [second]
        assert survey.failures == {}
        assert first not in pool.clients


async def test_newcomers_end_the_wait_for_workers_that_do_not_listen(cluster: Cluster, tmp_path: Path) -> None:
    async with cluster(1) as (pool, _):
        (first,) = addresses_of(pool)
        nobody = f"unix:{tmp_path}/nobody"
        pool.follow([nobody])
        waiting = asyncio.create_task(pool.survey(wait_for_ready=True))
        await asyncio.sleep(0)
        pool.follow([nobody, first])
        # Well before the deadline of an answer.
        survey = await asyncio.wait_for(waiting, rpc.DESCRIBE_DEADLINE_S / 2)
        assert list(survey.failures) == [nobody]


async def test_a_session_outlives_its_worker_in_the_list_and_its_channel_is_closed_with_the_next_mesh(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):
        first, second, third = addresses_of(pool)
        fanout = await assemble(pool)
        gone = pool.clients[second]
        pool.follow([first, third])
        # The fake answers every round as if it were the first.
        await fanout.round(ExecuteRequest(), "opened", 1)
        # It may come back, as it is.
        pool.follow([first, second, third])
        assert pool.clients[second] is gone
        pool.follow([first, third])
        fanout.close()
        assert (await assemble(pool)).addresses == (first, third)
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            await gone.describe(wait_for_ready=False)
        assert workers[1].sessions_open == 0


async def test_who_cannot_be_used_is_logged_once_for_each_reason(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):
        workers[0].description.protocol_version = rpc.PROTOCOL_VERSION + 1
        with capture_logs() as lines:
            for _ in range(3):
                (await assemble(pool)).close()
            workers[0].description.protocol_version = rpc.PROTOCOL_VERSION + 2
            (await assemble(pool)).close()
        said = [line["error"] for line in lines if line["event"] == "worker cannot be used"]
        assert [f"speaks protocol {rpc.PROTOCOL_VERSION + number}" in text for number, text in enumerate(said, 1)] == [True, True]


async def test_a_mesh_beside_another_takes_other_workers_first_and_ends_no_session(cluster: Cluster) -> None:
    async with cluster(4) as (pool, workers):
        addresses = addresses_of(pool)
        first = await assemble(pool)
        next_plan = plan_of(3, b"q" * 32)
        beside = await pool.assemble(next_plan, Path("/model"), 12, lambda _: None, beside=first.addresses)
        assert beside.addresses == (addresses[2], addresses[3], addresses[0])
        assert [worker.loads[-1].beside for worker in workers] == [True, False, True, True]
        assert [worker.loads[-1].assignment for worker in workers] == [1, 1, 1, 1]
        # Each plan has its own identity: the epochs of one end no sessions of the other.
        assert len({worker.executes[-1].open.coordinator for worker in workers}) == 2
        assert [worker.sessions_open for worker in workers] == [2, 1, 1, 1]
        first.close()
        beside.close()


async def test_without_room_for_both_nothing_is_loaded(cluster: Cluster) -> None:
    async with cluster(2) as (pool, workers):
        first = await assemble(pool)
        for worker in workers:
            worker.description.memory_free_bytes = 150
        with pytest.raises(OutOfMemory, match="beside what it holds now"):
            await pool.assemble(plan_of(1, b"q" * 32), Path("/model"), 12, lambda _: None, beside=first.addresses)
        assert [len(worker.loads) for worker in workers] == [1, 1]
        first.close()


async def test_workers_let_go_of_what_nobody_uses(cluster: Cluster) -> None:
    async with cluster(6) as (pool, workers):
        addresses = addresses_of(pool)
        fanout = await assemble(pool)
        other = b"x" * 32
        former = [FormerPlan(plan_digest=DIGEST, shard=1)]
        workers[0].description.held.CopyFrom(held(0, 4))
        # It serves, and holds what was to come.
        workers[1].description.held.CopyFrom(Held(state=WORKER_STATE_LOADED, plan_digest=other, former=former, assignment=5))
        # A spare with something else; one on which somebody has a session; one with this plan; one with this and another.
        workers[2].description.held.CopyFrom(held(0, 7, digest=other))
        workers[3].description.held.CopyFrom(held(0, 7, digest=other))
        workers[3].description.num_sessions = 1
        workers[4].description.held.CopyFrom(held(0, 3))
        unused = [FormerPlan(plan_digest=other, shard=0)]
        workers[5].description.held.CopyFrom(
            Held(state=WORKER_STATE_LOADED, plan_digest=DIGEST, shard=1, former=unused, assignment=6)
        )
        await pool.tidy(plan_of(2), Path("/model"), fanout.addresses)
        assert [worker.released for worker in workers] == [[], [], [7], [], [], [6]]
        again = [len(worker.loads) for worker in workers]
        assert again == [1, 2, 0, 0, 0, 0]
        request = workers[1].loads[-1]
        assert (request.plan.shard, request.beside, request.assignment) == (1, True, 1)
        assert addresses[:2] == list(fanout.addresses)
        fanout.close()


async def test_who_does_not_hold_the_lease_leaves_workers_alone(cluster: Cluster) -> None:
    async with cluster(3) as (pool, workers):
        fanout = await assemble(pool)
        workers[2].description.held.CopyFrom(held(0, 7, digest=b"x" * 32))
        pool._lease = SimpleNamespace(term=None)  # type: ignore[assignment]
        await pool.tidy(plan_of(2), Path("/model"), fanout.addresses)
        assert not workers[2].released
        fanout.close()
