"""One round to all shards, with sessions that do as they are told."""

import asyncio
from collections import deque
from collections.abc import Callable

import pytest

from coordinator.fanout import Fanout
from coordinator.rounds import Round
from protos import rpc
from protos.errors import MeshError, OutOfMemory, PlanMismatch, PositionMismatch, StaleEpoch, WorkerLost, WrongResult
from protos.shardworker_pb2 import Attend, ExecuteRequest, ExecuteResponse, Fault, Opened
from protos.tensor_pb2 import Tensor

DIGEST = b"d" * 32


def echo(request: ExecuteRequest, shard: int) -> ExecuteResponse:
    reply = ExecuteResponse(step=request.step, round=request.round, epoch=request.epoch, shard=shard)
    if request.WhichOneof("action") == "open":
        reply.opened.CopyFrom(Opened())
    else:
        reply.partial.CopyFrom(Tensor(shape=[shard + 1]))
    return reply


class FakeSession:
    """Answers by `answer`; an answer of None never comes."""

    def __init__(
        self, shard: int, log: list[str], answer: Callable[[ExecuteRequest, int], ExecuteResponse | None] = echo
    ) -> None:
        self.address = f"host-{shard}:1"
        self.cancelled = False
        self.requests: list[ExecuteRequest] = []
        self.write_hangs = False
        self.ended = asyncio.Event()
        self._shard, self._log, self._answer = shard, log, answer

    async def write(self, request: bytes) -> None:
        self._log.append(f"write {self._shard}")
        if self.write_hangs:
            await asyncio.Event().wait()
        self.requests.append(ExecuteRequest.FromString(request))

    async def read(self) -> bytes:
        self._log.append(f"read {self._shard}")
        reply = self._answer(self.requests[-1], self._shard)
        if reply is None:
            await asyncio.Event().wait()
            raise AssertionError
        return reply.SerializeToString()

    async def wait_ended(self) -> str:
        await self.ended.wait()
        return "the session ended (UNAVAILABLE: Socket closed)"

    def cancel(self) -> None:
        self.cancelled = True


def fanout_of(*sessions: FakeSession) -> Fanout:
    return Fanout(sessions, DIGEST, 7)  # type: ignore[arg-type]


def attend(step: int = 3) -> ExecuteRequest:
    return ExecuteRequest(step=step, attend=Attend(layer=0))


async def test_round_writes_to_all_before_reading_from_any_and_reads_in_shard_order() -> None:
    log: list[str] = []
    replies = await fanout_of(*(FakeSession(shard, log) for shard in range(3))).round(attend(), "partial", 1)
    assert log == ["write 0", "write 1", "write 2", "read 0", "read 1", "read 2"]
    assert [list(reply.partial.shape) for reply in replies] == [[1], [2], [3]]


async def test_two_rounds_under_way_are_read_in_the_order_in_which_they_were_sent() -> None:
    log: list[str] = []
    gate = asyncio.Event()
    waiting: deque[ExecuteRequest] = deque()

    class Slow(FakeSession):
        async def write(self, request: bytes) -> None:
            await super().write(request)
            waiting.append(self.requests[-1])

        async def read(self) -> bytes:
            await gate.wait()
            return echo(waiting.popleft(), 0).SerializeToString()

    fanout = fanout_of(Slow(0, log))
    rounds = [asyncio.create_task(fanout.round(attend(step), "partial", 1)) for step in (4, 5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [request.step for request in waiting] == [4, 5], "the second is sent before the first is answered"
    gate.set()
    assert [reply.step for one in rounds for reply in await one] == [4, 5]


async def test_round_is_fenced_and_counted_from_open_on() -> None:
    session = FakeSession(0, [])
    fanout = fanout_of(session)
    await fanout.open(b"c" * 16, 12)
    await fanout.round(attend(step=1), "partial", 1)
    await fanout.round(attend(step=1), "partial", 1)
    assert [(one.round, one.step, one.epoch, one.plan_digest) for one in session.requests] == [
        (1, 0, 7, DIGEST),
        (2, 1, 7, DIGEST),
        (3, 1, 7, DIGEST),
    ]
    opened = session.requests[0].open
    assert (opened.protocol_version, opened.coordinator, opened.num_pages) == (rpc.PROTOCOL_VERSION, b"c" * 16, 12)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("PLAN_MISMATCH", PlanMismatch),
        ("STALE_EPOCH", StaleEpoch),
        ("POSITION_MISMATCH", PositionMismatch),
        ("OUT_OF_MEMORY", OutOfMemory),
        ("BAD_STEP", MeshError),
        ("INVALID_ARGUMENT", MeshError),
        ("", MeshError),
    ],
)
async def test_fault_becomes_its_class_and_names_the_worker(reason: str, error: type[MeshError]) -> None:
    def fault(request: ExecuteRequest, shard: int) -> ExecuteResponse:
        del request, shard
        return ExecuteResponse(fault=Fault(reason=reason, message="wanted 3, found 4"))

    fanout = fanout_of(FakeSession(0, []), FakeSession(1, [], fault))
    with pytest.raises(MeshError, match="worker host-1:1: wanted 3, found 4") as raised:
        await fanout.round(attend(), "partial", 1)
    assert type(raised.value) is error


@pytest.mark.parametrize("field", ["step", "round", "epoch", "shard"])
async def test_reply_to_something_else_is_a_wrong_result(field: str) -> None:
    def off_by_one(request: ExecuteRequest, shard: int) -> ExecuteResponse:
        reply = echo(request, shard)
        setattr(reply, field, getattr(reply, field) + 1)
        return reply

    fanout = fanout_of(FakeSession(0, []), FakeSession(1, [], off_by_one))
    with pytest.raises(WrongResult, match=r"worker host-1:1 answered \(result, step, round, epoch, shard\) = .* wanted "):
        await fanout.round(attend(), "partial", 1)


async def test_reply_of_another_kind_or_none_is_a_wrong_result() -> None:
    fanout = fanout_of(FakeSession(0, []))
    with pytest.raises(WrongResult, match="partial"):
        await fanout.round(attend(), "squares", 1)
    empty = fanout_of(FakeSession(0, [], lambda request, _: ExecuteResponse(step=request.step, round=1, epoch=7)))
    with pytest.raises(WrongResult, match="None"):
        await empty.round(attend(), "partial", 1)


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_deadline_names_the_worker_that_is_silent(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "round_deadline_s", lambda _, num_rows: 0.01 * num_rows)
    sessions = [FakeSession(shard, [], (lambda *_: None) if shard == silent else echo) for shard in range(3)]
    with pytest.raises(WorkerLost, match=f"worker host-{silent}:1 did not answer within 0.01 s") as raised:
        await fanout_of(*sessions).round(attend(), "partial", 1)
    assert raised.value.shards == (silent,)


async def test_deadline_names_the_worker_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "round_deadline_s", lambda _, num_rows: 0.01 * num_rows)
    sessions = [FakeSession(shard, []) for shard in range(3)]
    sessions[2].write_hangs = True
    with pytest.raises(WorkerLost, match="worker host-2:1 did not answer"):
        await fanout_of(*sessions).round(attend(), "partial", 1)


async def test_each_answer_is_taken_before_the_next_one_is_awaited() -> None:
    log: list[str] = []
    taken: list[list[int]] = []

    def take(reply: ExecuteResponse) -> None:
        log.append("take")
        taken.append(list(reply.partial.shape))

    await fanout_of(FakeSession(0, log)).round(attend(), "partial", 1, take)
    assert log == ["write 0", "read 0", "take"]
    sessions = [FakeSession(shard, log) for shard in range(3)]
    log.clear()
    taken.clear()
    await fanout_of(*sessions).round(attend(), "partial", 1, take)
    assert taken == [[1], [2], [3]]
    assert log[:5] == ["write 0", "write 1", "write 2", "read 0", "take"]


async def test_what_is_no_message_is_a_wrong_result() -> None:
    class Babbling(FakeSession):
        async def read(self) -> bytes:
            return b"\xff\xff\xff"

    with pytest.raises(WrongResult, match="worker host-1:1 answered what is no message"):
        await fanout_of(FakeSession(0, []), Babbling(1, [])).round(attend(), "partial", 1)


async def test_a_failed_round_leaves_no_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "round_deadline_s", lambda _, num_rows: 0.01 * num_rows)
    before = asyncio.all_tasks()
    sessions = [FakeSession(shard, [], lambda *_: None) for shard in range(3)]
    with pytest.raises(WorkerLost, match="host-0:1"):
        await fanout_of(*sessions).round(attend(), "partial", 1)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_observer_is_told_the_bytes_of_each_answer() -> None:
    rounds: list[Round] = []
    sessions = [FakeSession(shard, []) for shard in range(2)]
    fanout = Fanout(sessions, DIGEST, 7, observer=rounds.append)  # type: ignore[arg-type]
    replies = await fanout.round(attend(), "partial", 5)
    (found,) = rounds
    assert (found.action, found.layer, found.step, found.num_rows) == ("attend", 0, 3, 5)
    assert [answer.num_bytes for answer in found.answers] == [reply.ByteSize() for reply in replies]
    assert found.request_bytes == sessions[0].requests[0].ByteSize()
    assert found.started_ns < found.written_ns < found.answers[0].arrived_ns < found.answers[1].arrived_ns


async def test_rounds_get_the_time_that_the_mesh_was_given() -> None:
    fanout = Fanout([FakeSession(0, [], lambda *_: None)], DIGEST, 7, timeout_s=0.02)  # type: ignore[arg-type]
    with pytest.raises(WorkerLost, match=r"did not answer within 0\.04 s"):
        await fanout.round(attend(), "partial", 40)


async def test_whoever_spoils_a_round_is_named_by_shard() -> None:
    def refuse(reply: ExecuteResponse) -> None:
        if reply.shard == 1:
            raise WrongResult("that is none")

    fanout = fanout_of(FakeSession(0, []), FakeSession(1, []))
    with pytest.raises(WrongResult) as raised:
        await fanout.round(attend(), "partial", 1, refuse)
    assert raised.value.shards == (1,)


async def test_a_session_that_ends_is_noticed_without_a_round() -> None:
    before = asyncio.all_tasks()
    sessions = [FakeSession(shard, []) for shard in range(3)]
    watching = asyncio.create_task(fanout_of(*sessions).watch())
    await asyncio.sleep(0)
    assert not watching.done()
    sessions[2].ended.set()
    with pytest.raises(WorkerLost, match=r"worker host-2:1: the session ended \(UNAVAILABLE: Socket closed\)") as raised:
        await watching
    assert raised.value.shards == (2,)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


def test_close_ends_all_sessions() -> None:
    sessions = [FakeSession(shard, []) for shard in range(3)]
    fanout = fanout_of(*sessions)
    assert fanout.addresses == ("host-0:1", "host-1:1", "host-2:1")
    fanout.close()
    assert all(session.cancelled for session in sessions)
