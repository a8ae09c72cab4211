"""One round to all shards: write to all before reading from any, read in shard order, one deadline."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from google.protobuf.message import DecodeError

from coordinator.rounds import Answer, Round
from protos import rpc
from protos.errors import ERRORS, InvalidArgument, MeshError, WorkerLost, WrongResult
from protos.shardworker_pb2 import ExecuteRequest, ExecuteResponse, Open

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence

    from coordinator.rounds import RoundObserver
    from coordinator.workers.client import WorkerSession

T = TypeVar("T")


class Fanout:
    """The sessions of a mesh, one for each shard, in shard order."""

    def __init__(
        self,
        sessions: Sequence[WorkerSession],
        plan_digest: bytes,
        epoch: int,
        *,
        timeout_s: float = rpc.ROUND_TIMEOUT_S,
        observer: RoundObserver | None = None,
    ) -> None:
        """Take over started sessions; `open` them before the first step.

        Args:
            sessions: one for each shard.
            plan_digest: of the mesh.
            epoch: this coordinator's count of meshes.
            timeout_s: longest that a round of a few rows may take.
            observer: told of each round that was answered.

        """
        self._observer = observer
        self._timeout_s = timeout_s
        self.plan_digest = plan_digest
        self.epoch = epoch
        self._sessions = tuple(sessions)
        self.addresses = tuple(session.address for session in sessions)
        """Of the workers, in shard order."""
        self._round = 0
        # Two rounds may be under way, of different steps.
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()

    async def open(self, coordinator: bytes, num_pages: int, lease_s: float = rpc.LEASE_S) -> None:
        """Open all sessions with KV pages of their own.

        Args:
            coordinator: identity of this process, 16 bytes.
            num_pages: KV pages of each session.
            lease_s: longest that a session is silent while this coordinator is sound.

        Raises:
            MeshError: a worker refuses, or does not hold its shard of the plan.

        """
        action = Open(
            protocol_version=rpc.PROTOCOL_VERSION, coordinator=coordinator, num_pages=num_pages, lease_ms=int(lease_s * 1000)
        )
        await self.round(ExecuteRequest(open=action), "opened", num_rows=0)

    async def round(
        self, request: ExecuteRequest, result: str, num_rows: int, take: Callable[[ExecuteResponse], None] | None = None
    ) -> list[ExecuteResponse]:
        """Send one request to all shards and collect their responses in shard order.

        Args:
            request: without fence and round, which are filled in here.
            result: the kind of result wanted, a field name of `ExecuteResponse`.
            num_rows: rows in the request, for the deadline.
            take: called with each response in shard order, as soon as it is there.

        Raises:
            WorkerLost: a stream is broken or a worker misses the deadline.
            WrongResult: a response belongs to something else.
            MeshError: what a worker's fault says, or what `take` raises.

        """
        deadline_s = rpc.round_deadline_s(self._timeout_s, num_rows)
        replies: list[ExecuteResponse] = []
        answers: list[Answer] = []
        awaited = 0
        try:
            async with asyncio.timeout(deadline_s):
                with _Together() as together:
                    async with self._sending:
                        started_ns = time.perf_counter_ns()
                        self._round += 1
                        request.plan_digest, request.epoch, request.round = self.plan_digest, self.epoch, self._round
                        data = request.SerializeToString()
                        for shard, written in enumerate(together.start(self._writes(data))):
                            awaited = shard
                            await written
                        written_ns = time.perf_counter_ns()
                    # Nothing waits between the locks, and both are fair: rounds are read in the order in which they were sent.
                    async with self._receiving:
                        for shard, read in enumerate(together.start(self._reads())):
                            awaited = shard
                            answer, received_ns = await read
                            reply = self._parsed(shard, answer, request, result)
                            arrived_ns = time.perf_counter_ns()
                            answers.append(Answer(reply.compute_ns, reply.queue_ns, arrived_ns, len(answer), received_ns))
                            replies.append(reply)
                            if take:
                                take(reply)
        except TimeoutError:
            raise WorkerLost(f"{self._name(awaited)} did not answer within {deadline_s:g} s", shards=(awaited,)) from None
        except MeshError as error:
            error.shards = error.shards or (awaited,)
            raise
        if self._observer:
            self._observer(self._record(request, num_rows, (started_ns, written_ns), len(data), answers))
        return replies

    async def watch(self) -> NoReturn:
        """Wait until a session ends.

        Raises:
            WorkerLost: one has ended, whether or not a round was under way.

        """
        watching = [asyncio.ensure_future(session.wait_ended()) for session in self._sessions]
        try:
            await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            shard = next(shard for shard, ended in enumerate(watching) if ended.done())
            raise WorkerLost(f"{self._name(shard)}: {watching[shard].result()}", shards=(shard,))
        finally:
            for ended in watching:
                ended.cancel()

    def _record(
        self, request: ExecuteRequest, num_rows: int, times: tuple[int, int], request_bytes: int, answers: list[Answer]
    ) -> Round:
        action = request.WhichOneof("action") or ""
        layer = getattr(getattr(request, action), "layer", None)
        experts = request.feed_forward.experts.data
        return Round(
            action, layer, request.step, num_rows, *times, request_bytes, tuple(answers), workers=self.addresses, experts=experts
        )

    def _writes(self, data: bytes) -> Iterator[Coroutine[Any, Any, None]]:
        return (session.write(data) for session in self._sessions)

    def _reads(self) -> Iterator[Coroutine[Any, Any, tuple[bytes, int]]]:
        return (_receive(session) for session in self._sessions)

    def close(self) -> None:
        """End all sessions."""
        for session in self._sessions:
            session.cancel()

    def _parsed(self, shard: int, answer: bytes, request: ExecuteRequest, result: str) -> ExecuteResponse:
        try:
            reply = ExecuteResponse.FromString(answer)
        except DecodeError as error:
            raise WrongResult(f"{self._name(shard)} answered what is no message: {error}") from None
        kind = reply.WhichOneof("result")
        if kind == "fault":
            fault = reply.fault
            kind = ERRORS.get(fault.reason, MeshError)
            # What a worker calls invalid this coordinator made: no caller can mend it.
            raise (MeshError if kind is InvalidArgument else kind)(f"{self._name(shard)}: {fault.message}")
        found = (kind, reply.step, reply.round, reply.epoch, reply.shard)
        wanted = (result, request.step, request.round, request.epoch, shard)
        if found != wanted:
            names = "(result, step, round, epoch, shard)"
            raise WrongResult(f"{self._name(shard)} answered {names} = {found}, wanted {wanted}")
        return reply

    def _name(self, shard: int) -> str:
        return f"worker {self._sessions[shard].address}"


async def _receive(session: WorkerSession) -> tuple[bytes, int]:
    """Read an answer and note when it came; it may be looked at later."""
    return await session.read(), time.perf_counter_ns()


class _Together:
    """Work side by side without a task for the first: a round on one worker needs none."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Iterable[Coroutine[Any, Any, T]]) -> list[Awaitable[T]]:
        """Start all; the first one runs when it is awaited, which must be at once."""
        first, *others = work
        tasks = [asyncio.ensure_future(other) for other in others]
        self._tasks += tasks
        return [first, *tasks]

    def __enter__(self) -> Self:
        """Use as a context at whose end whatever still runs is cancelled."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what was not awaited to its end."""
        for task in self._tasks:
            if not task.cancel():
                # Failed beside another one, whose failure is told.
                task.cancelled() or task.exception()
