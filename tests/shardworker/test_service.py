"""The service over a real server on a unix socket."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import plan_pb2, shardworker_pb2, tensor_pb2
from protos.digest import mesh_digest, shard_digest
from protos.errors import error_reason
from protos.rpc import PROTOCOL_VERSION
from shardworker import loader, loading, service
from shardworker.memory import Memory
from shardworker.shard import Shard

EMPTY, LOADING, LOADED = (
    shardworker_pb2.WORKER_STATE_EMPTY,
    shardworker_pb2.WORKER_STATE_LOADING,
    shardworker_pb2.WORKER_STATE_LOADED,
)
NAME = "shardmesh.v1.ShardWorker"


async def state(client: Any) -> int:
    return (await client.describe()).held.state


async def serving(client: Any, name: str) -> bool:
    answer = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(service=name))
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110  # the worker is asked; it has no event to give
            await asyncio.sleep(0.005)


async def refusal(client: Any, request: Any) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.load(request)
    assert raised.value.details()
    return raised.value.code(), error_reason(raised.value)


def other_plan(tiny: Any) -> plan_pb2.ShardPlan:
    plan = tiny.plan()
    plan.page_tokens = 8
    return plan


class Gate:
    """Holds every load at its first report until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, obeys: bool = True) -> None:
        self.open = threading.Event()
        self.entered = 0
        load = loader.load_weights

        def slow(plan: Any, directory: Any, device: Any, report: Any, is_cancelled: Any, **others: Any) -> Any:
            self.entered += 1
            while not self.open.wait(0.002) and not (obeys and is_cancelled()):
                pass
            return load(plan, directory, device, report, is_cancelled, **others)

        monkeypatch.setattr(loading, "load_weights", slow)


async def test_an_empty_worker_describes_itself(client: Any) -> None:
    found = await client.describe()
    assert found.held == shardworker_pb2.Held(state=EMPTY)
    assert (found.protocol_version, found.device, found.num_threads) == (PROTOCOL_VERSION, "cpu", 1)
    assert found.version
    assert 0 < found.memory_free_bytes <= found.memory_total_bytes
    assert found.peak_rss_bytes > 0
    assert (found.weights_bytes, found.num_sessions, found.kv_bytes) == (0, 0, 0)


async def test_health_says_whether_a_plan_is_loaded(client: Any) -> None:
    assert await serving(client, "")
    assert not await serving(client, NAME)
    await client.load()
    assert await serving(client, NAME)
    await client.stub.Release(shardworker_pb2.ReleaseRequest(assignment=1))
    assert not await serving(client, NAME)


async def test_reflection_lists_the_service(client: Any) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    assert NAME in {service.name for service in answer.list_services_response.service}
    await call.done_writing()


async def test_load_reports_progress_and_then_one_loaded(client: Any, tiny: Any) -> None:
    *progress, last = await client.load()
    assert progress
    assert all(one.WhichOneof("event") == "progress" for one in progress)
    loaded = last.loaded
    digest = mesh_digest([shard_digest(tiny.plan())])
    assert loaded.held == shardworker_pb2.Held(state=LOADED, plan_digest=digest, shard=0, assignment=1)
    assert progress[-1].progress.loaded_bytes == progress[-1].progress.total_bytes == loaded.weights_bytes
    assert not loaded.already_held
    assert loaded.load_ns > 0
    assert (await client.describe()).weights_bytes == loaded.weights_bytes


async def test_a_held_plan_is_not_read_again_and_its_sessions_go_on(client: Any, tiny: Any, make_batch: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await talk.step(1, make_batch((1, 0, 1, [0])))
    request = tiny.load_request(assignment=5)
    for number in range(tiny.num_files):
        (tiny.directory / f"{number}.safetensors").unlink()
    (answer,) = await client.load(request)
    assert answer.loaded.already_held
    assert answer.loaded.held.assignment == 5
    answers = await talk.step(2, make_batch((1, 1, 1, [])))
    assert [one.WhichOneof("result") for one in answers] == ["partial", "partial"]


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda r: setattr(r, "protocol_version", 99), grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_MISMATCH"),
        (lambda r: setattr(r, "assignment", 0), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (lambda r: r.shard_digests.__setitem__(0, bytes(32)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (lambda r: r.shard_digests.append(bytes(32)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (lambda r: r.plan.ClearField("layers"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    ],
)
async def test_a_refused_load_leaves_the_held_plan(client: Any, tiny: Any, change: Any, code: Any, reason: str) -> None:
    await client.load()
    request = tiny.load_request(assignment=2)
    change(request)
    assert await refusal(client, request) == (code, reason)
    assert await state(client) == LOADED


async def test_a_lower_assignment_is_stale(client: Any, tiny: Any) -> None:
    await client.load(tiny.load_request(assignment=4))
    request = tiny.load_request([other_plan(tiny)], assignment=3)
    assert await refusal(client, request) == (grpc.StatusCode.ABORTED, "STALE_EPOCH")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.stub.Release(shardworker_pb2.ReleaseRequest(assignment=3))
    assert raised.value.code() == grpc.StatusCode.ABORTED
    assert (await client.describe()).held.assignment == 4


async def test_a_failed_load_leaves_the_worker_empty(client: Any, tiny: Any) -> None:
    await client.load()
    request = tiny.load_request([other_plan(tiny)], assignment=2)
    (tiny.directory / "1.safetensors").unlink()
    assert await refusal(client, request) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
    assert (await client.describe()).held == shardworker_pb2.Held(state=EMPTY, assignment=2)
    assert (await client.describe()).weights_bytes == 0


async def test_too_little_memory_is_said_and_leaves_the_worker_empty(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "device_memory", lambda _: Memory(10, 5))
    assert await refusal(client, client.tiny.load_request()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
    assert await state(client) == EMPTY


async def test_another_plan_replaces_and_old_sessions_are_told(client: Any, tiny: Any, make_batch: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await talk.step(1, make_batch((1, 0, 1, [0])))
    other = other_plan(tiny)
    await client.load(tiny.load_request([other], assignment=2))
    fault = (await talk.attend(2, 0, torch.ones(1, 64), make_batch((1, 1, 1, [])))).fault
    assert (fault.code, fault.reason) == (9, "PLAN_MISMATCH")
    assert fault.held.plan_digest == mesh_digest([shard_digest(other)])
    assert (await client.describe()).kv_bytes == 0
    # The old plan comes back; what the session held does not.
    await client.load(tiny.load_request(assignment=3))
    fault = (await talk.attend(2, 0, torch.ones(1, 64), make_batch((1, 1, 1, [])))).fault
    assert fault.reason == "PLAN_MISMATCH"


async def test_while_loading_everything_else_answers(
    client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, make_batch: Any
) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    gate = Gate(monkeypatch)
    load = client.stub.Load(tiny.load_request([other_plan(tiny)], assignment=2))
    await until(lambda: _is(client, LOADING))
    assert not await serving(client, NAME)
    fault = (await talk.attend(1, 0, torch.ones(1, 64), make_batch((1, 0, 1, [0])))).fault
    assert (fault.reason, fault.held.state) == ("PLAN_MISMATCH", LOADING)
    # Nothing moves, and still there are signs of life.
    for _ in range(3):
        assert (await load.read()).progress.loaded_bytes == 0
    gate.open.set()
    while (answer := await load.read()).WhichOneof("event") == "progress":
        pass
    assert answer.loaded.held.state == LOADED
    assert await state(client) == LOADED


async def _is(client: Any, wanted: int) -> bool:
    return await state(client) == wanted


async def test_a_second_load_of_the_same_plan_joins(client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    loads = [asyncio.create_task(client.load())]
    await until(lambda: _is(client, LOADING))
    loads.append(asyncio.create_task(client.load(tiny.load_request(assignment=2))))
    await until(lambda: _has_assignment(client, 2))
    gate.open.set()
    answers = await asyncio.gather(*loads)
    assert [answer[-1].loaded.held.state for answer in answers] == [LOADED, LOADED]
    assert gate.entered == 1


async def _has_assignment(client: Any, assignment: int) -> bool:
    return (await client.describe()).held.assignment == assignment


async def test_another_plan_takes_the_place_of_a_load_under_way(client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    first = asyncio.create_task(client.load())
    await until(lambda: _is(client, LOADING))
    second = asyncio.create_task(client.load(tiny.load_request([other_plan(tiny)], assignment=2)))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await first
    assert error_reason(raised.value) == "PLAN_MISMATCH"
    gate.open.set()
    assert (await second)[-1].loaded.held.plan_digest == mesh_digest([shard_digest(other_plan(tiny))])


async def test_a_load_whose_caller_leaves_is_given_up(client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    call = client.stub.Load(tiny.load_request())
    await call.read()
    assert await state(client) == LOADING
    call.cancel()
    await until(lambda: _is(client, EMPTY))
    gate.open.set()
    assert (await client.load())[-1].loaded.held.state == LOADED


async def test_a_load_that_was_given_up_is_not_joined(client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, obeys=False)
    call = client.stub.Load(tiny.load_request())
    await call.read()
    given_up = client.holding._loading.cancelled
    call.cancel()
    await until(lambda: _returned(given_up.is_set()))
    again = asyncio.create_task(client.load())
    await until(lambda: _returned(client.holding._loading.cancelled is not given_up))
    gate.open.set()
    assert (await again)[-1].loaded.held.state == LOADED
    assert gate.entered == 2


async def _returned(value: bool) -> bool:  # the condition of `until`
    return value


async def test_one_of_two_callers_may_leave(client: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    stays = asyncio.create_task(client.load())
    await until(lambda: _is(client, LOADING))
    leaves = client.stub.Load(tiny.load_request())
    await leaves.read()
    leaves.cancel()
    await client.describe()
    gate.open.set()
    assert (await stays)[-1].loaded.held.state == LOADED


async def test_release_gives_everything_back(client: Any, make_batch: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    for _ in range(2):
        answer = await client.stub.Release(shardworker_pb2.ReleaseRequest(assignment=2))
        assert answer.held == shardworker_pb2.Held(state=EMPTY, assignment=2)
    assert (await client.describe()).kv_bytes == 0
    fault = (await talk.attend(1, 0, torch.ones(1, 64), make_batch((1, 0, 1, [0])))).fault
    assert (fault.reason, fault.held.state) == ("PLAN_MISMATCH", EMPTY)


@pytest.mark.parametrize("way", ["done", "cancel", "channel"])
async def test_the_end_of_a_stream_frees_its_kv(client: Any, way: str, make_batch: Any) -> None:
    await client.load()
    async with grpc.aio.insecure_channel(client.worker.address) as channel:
        mine = type(client)(channel, client.tiny, client.worker)
        talk = mine.talk()
        opened = (await talk.open()).opened
        await talk.step(1, make_batch((1, 0, 1, [0])))
        found = await client.describe()
        assert (found.num_sessions, found.kv_bytes) == (1, opened.kv_bytes)
        (session,) = client.holding.sessions
        if way == "done":
            await talk.call.done_writing()
            assert await talk.call.read() is grpc.aio.EOF
        elif way == "cancel":
            talk.call.cancel()
        else:
            await channel.close()

        async def is_free() -> bool:
            found = await client.describe()
            return (found.num_sessions, found.kv_bytes) == (0, 0)

        await until(is_free)
        # The device's thread frees it after the rounds before.
        await client.holding.executor.submit(lambda: None)
        assert not client.holding.sessions
        assert session._kv is None


async def test_a_session_answers_with_its_numbers_and_times(client: Any, make_batch: Any) -> None:
    await client.load()
    talk = client.talk(epoch=7)
    opened = await talk.open()
    assert (opened.epoch, opened.opened.held.state) == (7, LOADED)
    assert opened.opened.kv_bytes == 2 * 2 * 3 * 16 * 4 * 16 * 4
    for answer in await talk.step(3, make_batch((1, 0, 1, [0]))):
        assert (answer.epoch, answer.shard, answer.WhichOneof("result")) == (7, 0, "partial")
        assert answer.compute_ns > 0
        assert answer.queue_ns > 0


async def test_faults_name_the_reason_and_the_session_lives_on(client: Any, tiny: Any, make_batch: Any) -> None:
    talk = client.talk()
    assert (await talk.open()).fault.reason == "PLAN_MISMATCH"
    await client.load()
    one, x = make_batch((1, 0, 1, [0])), torch.ones(1, 64)
    assert (await talk.attend(1, 0, x, one)).fault.reason == "INVALID_ARGUMENT"
    await talk.open()
    assert (await talk.open()).fault.reason == "INVALID_ARGUMENT"
    fault = (await talk.attend(1, 0, x, make_batch((9, 5, 1, [0, 1])))).fault
    assert (fault.code, fault.reason, fault.sequence, fault.position) == (10, "POSITION_MISMATCH", 9, 0)
    assert (await talk.attend(1, 1, x)).fault.reason == "STEP_MISMATCH"
    talk.rounds.digest = bytes(32)
    fault = (await talk.attend(1, 0, x, one)).fault
    assert (fault.reason, fault.held.plan_digest) == ("PLAN_MISMATCH", mesh_digest([shard_digest(tiny.plan())]))
    talk.rounds.digest = fault.held.plan_digest
    talk.rounds.round += 1
    assert (await talk.attend(1, 0, x, one)).fault.reason == "STEP_MISMATCH"
    talk.rounds.round -= 1
    answers = await talk.step(1, one)
    assert [answer.WhichOneof("result") for answer in answers] == ["partial", "partial"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: setattr(r.open, "num_pages", 0),
        lambda r: setattr(r, "epoch", 0),
        lambda r: setattr(r.open, "coordinator", b"short"),
    ],
)
async def test_a_bad_open_is_refused_and_may_be_said_again(client: Any, change: Any) -> None:
    await client.load()
    talk = client.talk()
    request = talk.rounds.open()
    change(request)
    assert (await talk.ask(request)).fault.reason == "INVALID_ARGUMENT"
    assert (await talk.open()).WhichOneof("result") == "opened"


async def test_an_open_of_another_protocol_or_too_many_pages_is_refused(client: Any) -> None:
    await client.load()
    talk = client.talk()
    request = talk.rounds.open()
    request.open.protocol_version = 99
    assert (await talk.ask(request)).fault.reason == "PROTOCOL_MISMATCH"
    assert (await talk.open(2**32 - 1)).fault.reason == "INVALID_ARGUMENT"
    fault = (await talk.open(2**27)).fault
    assert (fault.code, fault.reason) == (8, "OUT_OF_MEMORY")
    assert (await client.describe()).kv_bytes == 0


async def test_a_newer_epoch_ends_the_older_sessions_of_its_coordinator_only(client: Any, make_batch: Any) -> None:
    await client.load()
    old, stranger = client.talk(epoch=5), client.talk(epoch=1, coordinator=b"x" * 16)
    for talk in (old, stranger):
        await talk.open()
    new = client.talk(epoch=6)
    opened = (await new.open()).opened
    fault = (await old.attend(1, 0, torch.ones(1, 64), make_batch((1, 0, 1, [0])))).fault
    assert (fault.code, fault.reason) == (10, "STALE_EPOCH")
    assert (await client.describe()).kv_bytes == 2 * opened.kv_bytes
    for talk in (new, stranger):
        answers = await talk.step(1, make_batch((1, 0, 1, [0])))
        assert [answer.WhichOneof("result") for answer in answers] == ["partial", "partial"]
    assert (await client.talk(epoch=5).open()).fault.reason == "STALE_EPOCH"
    new.rounds.epoch = 7
    assert (await new.attend(2, 0, torch.ones(1, 64), make_batch((1, 1, 1, [])))).fault.reason == "STALE_EPOCH"


async def test_what_breaks_inside_is_a_fault_without_details(
    client: Any, monkeypatch: pytest.MonkeyPatch, make_batch: Any
) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(service.log, "error", lambda event, **facts: lines.append({"event": event, **facts}))
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "project", lambda *_: 1 / 0)
        fault = (await talk.attend(1, 0, torch.ones(1, 64), make_batch((1, 0, 1, [0])))).fault
    assert (fault.code, fault.reason) == (13, "INTERNAL")
    assert "division" not in fault.message
    frames = lines[0].pop("frames")
    assert lines == [{"event": "round failed", "epoch": 1, "step": 1, "error": "ZeroDivisionError"}]
    assert "in answer" in frames
    assert "division" not in frames
    assert len(await talk.step(2, make_batch((1, 0, 1, [0])))) == 2


async def test_bytes_that_are_no_message_end_the_stream_with_a_status(client: Any) -> None:
    call = client.channel.stream_stream(f"/{NAME}/Execute", request_serializer=None, response_deserializer=None)()
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert (raised.value.code(), error_reason(raised.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


@pytest.mark.parametrize("field", ["hidden", "squares"])
def test_a_round_is_short_if_the_last_one_of_its_action_was(field: str) -> None:
    def attend(rows: int) -> shardworker_pb2.ExecuteRequest:
        shape = tensor_pb2.Tensor(shape=[rows, 64])
        return shardworker_pb2.ExecuteRequest(attend=shardworker_pb2.Attend(**{field: shape}))

    durations = service.Durations()
    assert not durations.are_short(attend(1)), "nobody knows yet"
    durations.note(attend(2), service.SHORT_NS // 4)
    assert durations.are_short(attend(1))
    assert durations.are_short(attend(8))
    assert not durations.are_short(attend(9)), "time may grow with the rows"
    durations.note(attend(512), 10 * service.SHORT_NS)
    assert not durations.are_short(attend(1)), "it may be the context that takes long"
    head = shardworker_pb2.ExecuteRequest(head=shardworker_pb2.Head(hidden=tensor_pb2.Tensor(shape=[1, 64])))
    durations.note(attend(1), 1)
    assert durations.are_short(attend(1))
    assert not durations.are_short(head), "each action by itself"
