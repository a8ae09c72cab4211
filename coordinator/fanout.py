"""One round to all shards: write to all before reading from any, read in shard order, one deadline."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from coordinator.rounds import Answer, Round
from protos import rpc
from protos.errors import ERRORS, MeshError, WorkerLost, WrongResult
from protos.shardworker_pb2 import ExecuteRequest, Open

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.rounds import RoundObserver
    from coordinator.workers.client import WorkerSession
    from protos.shardworker_pb2 import ExecuteResponse


class Fanout:
    """The sessions of a mesh, one for each shard, in shard order."""

    def __init__(
        self, sessions: Sequence[WorkerSession], plan_digest: bytes, epoch: int, observer: RoundObserver | None = None
    ) -> None:
        """Take over started sessions; `open` them before the first step.

        Args:
            sessions: one for each shard.
            plan_digest: of the mesh.
            epoch: this coordinator's count of meshes.
            observer: told of each round that was answered.

        """
        self._observer = observer
        self.plan_digest = plan_digest
        self.epoch = epoch
        self._sessions = tuple(sessions)
        self._round = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the workers, in shard order."""
        return tuple(session.address for session in self._sessions)

    async def open(self, coordinator: bytes, num_pages: int) -> None:
        """Open all sessions with KV pages of their own.

        Args:
            coordinator: identity of this process, 16 bytes.
            num_pages: KV pages of each session.

        Raises:
            MeshError: a worker refuses, or does not hold its shard of the plan.

        """
        action = Open(protocol_version=rpc.PROTOCOL_VERSION, coordinator=coordinator, num_pages=num_pages)
        await self.round(ExecuteRequest(open=action), "opened", num_rows=0)

    async def round(self, request: ExecuteRequest, result: str, num_rows: int) -> list[ExecuteResponse]:
        """Send one request to all shards and collect their responses in shard order.

        Args:
            request: without fence and round, which are filled in here.
            result: the kind of result wanted, a field name of `ExecuteResponse`.
            num_rows: rows in the request, for the deadline.

        Raises:
            WorkerLost: a stream is broken or a worker misses the deadline.
            WrongResult: a response belongs to something else.
            MeshError: what a worker's fault says.

        """
        started_ns = time.perf_counter_ns()
        self._round += 1
        request.plan_digest, request.epoch, request.round = self.plan_digest, self.epoch, self._round
        data = request.SerializeToString()
        deadline_s = rpc.round_deadline_s(num_rows)
        replies: list[ExecuteResponse] = []
        arrived_ns: list[int] = []
        written_ns = 0
        awaited = ""
        try:
            async with asyncio.timeout(deadline_s):
                for session in self._sessions:
                    awaited = session.address
                    await session.write(data)
                written_ns = time.perf_counter_ns()
                for session in self._sessions:
                    awaited = session.address
                    replies.append(await session.read())
                    arrived_ns.append(time.perf_counter_ns())
        except TimeoutError:
            raise WorkerLost(f"worker {awaited} did not answer within {deadline_s:g} s") from None
        for shard, reply in enumerate(replies):
            self._check(shard, reply, request, result)
        if self._observer:
            answers = tuple(
                Answer(reply.compute_ns, reply.queue_ns, arrived, reply.ByteSize())
                for reply, arrived in zip(replies, arrived_ns, strict=True)
            )
            action = request.WhichOneof("action") or ""
            layer = getattr(getattr(request, action), "layer", None)
            self._observer(Round(action, layer, request.step, num_rows, started_ns, written_ns, len(data), answers))
        return replies

    def close(self) -> None:
        """End all sessions."""
        for session in self._sessions:
            session.cancel()

    def _check(self, shard: int, reply: ExecuteResponse, request: ExecuteRequest, result: str) -> None:
        kind = reply.WhichOneof("result")
        if kind == "fault":
            fault = reply.fault
            raise ERRORS.get(fault.reason, MeshError)(f"{self._name(shard)}: {fault.message}")
        found = (kind, reply.step, reply.round, reply.epoch, reply.shard)
        wanted = (result, request.step, request.round, request.epoch, shard)
        if found != wanted:
            names = "(result, step, round, epoch, shard)"
            raise WrongResult(f"{self._name(shard)} answered {names} = {found}, wanted {wanted}")

    def _name(self, shard: int) -> str:
        return f"worker {self._sessions[shard].address}"
