"""The ShardWorker service: message in, message out. What may be done is decided in `holding` and `session`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import grpc
import structlog

from protos import shardworker_pb2 as pb
from protos.digest import mesh_digest
from protos.errors import InvalidArgument, MeshError, PlanMismatch, StaleEpoch, StepMismatch
from protos.log import frames
from protos.rpc import COORDINATOR_BYTES, PROTOCOL_VERSION
from protos.shardworker_pb2_grpc import ShardWorkerServicer
from shardworker.holding import Holding, Owner
from shardworker.lease import Lease
from shardworker.loading import MeshShard, check_protocol
from shardworker.memory import device_memory, peak_rss_bytes
from shardworker.plan import check_files
from shardworker.session import Session
from shardworker.source import Folder
from shardworker.supply import Supply, check_offer
from shardworker.tables import HeldPosition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from protos.plan_pb2 import CheckpointFile

SHORT_NS = 10_000_000
"""Health checks and other calls may wait this long for a round."""

log = structlog.get_logger(__name__)


class ShardWorkerService(ShardWorkerServicer):
    """The six calls."""

    def __init__(self, holding: Holding, version: str) -> None:
        self._holding = holding
        self._version = version
        self._num_streams = 0

    async def Describe(  # noqa: N802  # the name in the .proto file
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeResponse:
        """Say what the worker is and holds."""
        del request, context
        holding, executor = self._holding, self._holding.executor
        memory = device_memory(executor.device)
        return pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            version=self._version,
            held=holding.held(),
            device=executor.device.type,
            kernels=holding.kernels.name,
            num_threads=executor.num_threads,
            memory_total_bytes=memory.total,
            memory_free_bytes=memory.free,
            weights_bytes=holding.weights_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            num_sessions=self._num_streams,
            kv_bytes=sum(session.kv_bytes for session in holding.sessions),
        )

    async def Load(  # noqa: N802  # the name in the .proto file
        self, request: pb.LoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.LoadResponse]:
        """Become the shard of a plan."""
        del context
        start = time.perf_counter_ns()
        holding = self._holding
        already_held = True
        async with contextlib.aclosing(holding.load(request)) as progresses:
            async for progress in progresses:
                already_held = False
                report = pb.LoadProgress(loaded_bytes=progress.loaded_bytes, total_bytes=progress.total_bytes)
                yield pb.LoadResponse(progress=report)
        yield pb.LoadResponse(
            loaded=pb.Loaded(
                held=holding.held(),
                weights_bytes=holding.check_plan(mesh_digest(request.shard_digests)).weights_bytes,
                already_held=already_held,
                load_ns=time.perf_counter_ns() - start,
            )
        )

    async def Supply(  # noqa: N802  # the name in the .proto file
        self, request_iterator: AsyncIterator[pb.SupplyRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Take bytes of a checkpoint, for as long as the coordinator wants."""
        del request_iterator
        request = await context.read()
        if isinstance(request, MeshError):
            raise request
        offer = check_offer(request)
        check_protocol(offer.protocol_version)
        of = MeshShard(offer.plan_digest, offer.shard)
        supply = Supply(context)
        offers = self._holding.supplies.setdefault(of, [])
        offers.append(supply)
        try:
            await context.send_initial_metadata(())
            await supply.wait_over()
        finally:
            supply.close()
            offers.remove(supply)
            if not offers and self._holding.supplies.get(of) is offers:
                del self._holding.supplies[of]

    async def Warm(  # noqa: N802  # the name in the .proto file
        self, request: pb.WarmRequest, context: grpc.aio.ServicerContext
    ) -> pb.WarmResponse:
        """Read a plan's files into the page cache."""
        del context
        check_protocol(request.protocol_version)
        check_files(request.files)
        return pb.WarmResponse(file_bytes=await asyncio.to_thread(_warm, request.directory, request.files))

    async def Release(  # noqa: N802  # the name in the .proto file
        self, request: pb.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseResponse:
        """Drop the held plan."""
        del context
        if request.assignment == 0:
            raise InvalidArgument("assignment: wanted at least 1, found 0")
        await self._holding.release(request.assignment)
        return pb.ReleaseResponse(held=self._holding.held())

    async def Execute(  # noqa: N802  # the name in the .proto file
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one session; everything it holds goes when the stream ends."""
        del request_iterator
        stream = ExecuteStream(self._holding)
        self._num_streams += 1
        try:
            async with Lease() as lease:
                while (request := await context.read()) is not grpc.aio.EOF:
                    # What the interceptor could not parse.
                    if isinstance(request, MeshError):
                        raise request
                    lease.suspend()
                    answer = await stream.answer(request)
                    if answer.HasField("opened") and request.open.lease_ms:
                        lease.extend(request.open.lease_ms / 1000)
                    lease.renew()
                    await context.write(answer)
        finally:
            self._num_streams -= 1
            stream.close()


def _warm(directory: str, files: Sequence[CheckpointFile]) -> int:
    with Folder(directory, files) as folder:
        return folder.warm()


class ExecuteStream:
    """One Execute call: fences each request, has it executed, and turns errors into faults."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._session: Session | None = None
        self._owner = Owner(b"", 0, b"")
        self._round = 0
        self._shard = 0
        self._durations = Durations()

    async def answer(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        """Serve one request or say why not; never raises for what the request says."""
        self._round += 1
        try:
            response = await self._serve(request)
        except MeshError as error:
            response = pb.ExecuteResponse(fault=self._fault(error))
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a fault
            # Not its text: it may quote what a caller sent.
            kind = type(error).__name__
            log.error("round failed", epoch=request.epoch, step=request.step, error=kind, frames=frames(error))  # noqa: TRY400
            response = pb.ExecuteResponse(fault=self._fault(MeshError("internal error; the worker's log has the details")))
        response.step = request.step
        response.round = request.round
        response.epoch = self._owner.epoch
        response.shard = self._shard
        return response

    def close(self) -> None:
        """Free what the session holds, after the round that may still be running."""
        if self._session is not None:
            self._holding.end(self._session)

    async def _serve(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        if request.round != self._round:
            raise StepMismatch(f"this is message {self._round} of the session, found round {request.round}: open another stream")
        if request.WhichOneof("action") == "open":
            return await self._open(request)
        holding, session, owner = self._holding, self._session, self._owner
        holding.check_plan(request.plan_digest)
        if session is None:
            raise InvalidArgument("the first request of a stream is `open`")
        if request.epoch != owner.epoch:
            raise StaleEpoch(f"the session is of epoch {owner.epoch}, the request of {request.epoch}: open another stream")
        if holding.is_over(owner):
            raise StaleEpoch(f"epoch {owner.epoch} is over: the coordinator opened newer sessions")
        executor, durations = holding.executor, self._durations
        run = executor.run_short if durations.are_short(request) else executor.submit
        response, queue_ns, compute_ns = await run(lambda: session.execute(request))
        durations.note(request, compute_ns)
        holding.tally.add(request.WhichOneof("action") or "", compute_ns, queue_ns)
        response.queue_ns = queue_ns
        response.compute_ns = compute_ns
        return response

    async def _open(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        """Reserve KV memory; the epoch counts, and older sessions end, even if there is too little of it."""
        holding, action = self._holding, request.open
        check_protocol(action.protocol_version)
        shard = holding.check_plan(request.plan_digest)
        if self._session is not None:
            raise InvalidArgument("the session is open already: open another stream for another session")
        if action.num_pages == 0 or request.epoch == 0 or len(action.coordinator) != COORDINATOR_BYTES:
            raise InvalidArgument(
                f"open: wanted pages and an epoch >= 1 and {COORDINATOR_BYTES} bytes of coordinator, "
                f"found {action.num_pages}, {request.epoch} and {len(action.coordinator)}"
            )
        owner = Owner(action.coordinator, request.epoch, request.plan_digest)
        end_older = holding.begin_epoch(owner.coordinator, owner.epoch)

        def reserve() -> Session:
            # In the device's thread, so that pools which were closed before are free.
            end_older()
            return Session(shard, action.num_pages, sum(session.uncommitted_bytes for session in tuple(holding.sessions)))

        session, queue_ns, compute_ns = await holding.executor.submit(reserve)
        # The plan may have been replaced meanwhile.
        if holding.check_plan(request.plan_digest) is not shard:
            raise PlanMismatch("the plan was dropped and loaded again meanwhile: open again")
        self._session, self._owner, self._shard = session, owner, shard.plan.shard
        # Of this call's context, which ends with it.
        structlog.contextvars.bind_contextvars(epoch=request.epoch, shard=self._shard)
        holding.begin(session, owner)
        opened = pb.Opened(held=holding.held(), kv_bytes=session.kv_bytes)
        return pb.ExecuteResponse(opened=opened, queue_ns=queue_ns, compute_ns=compute_ns)

    def _fault(self, error: MeshError) -> pb.Fault:
        self._holding.tally.faults[error.reason] += 1
        code: int = error.code.value[0]
        fault = pb.Fault(code=code, reason=error.reason, message=str(error), held=self._holding.held())
        if isinstance(error, HeldPosition):
            fault.sequence, fault.position = error.sequence, error.position
        return fault


class Durations:
    """How long rounds take, by their action: what is foretold to be short may hold up the event loop."""

    def __init__(self) -> None:
        # Of the last round of each action: rows, and nanoseconds.
        self._last: dict[str | None, tuple[int, int]] = {}

    def are_short(self, request: pb.ExecuteRequest) -> bool:
        """Whether such a round is short even if its time grows with its rows; nobody knows of the first one."""
        last_rows, last_ns = self._last.get(request.WhichOneof("action"), (1, SHORT_NS + 1))
        return last_ns * max(1.0, _num_rows(request) / max(1, last_rows)) <= SHORT_NS

    def note(self, request: pb.ExecuteRequest, compute_ns: int) -> None:
        """Remember a round that was served."""
        self._last[request.WhichOneof("action")] = (_num_rows(request), compute_ns)


def _num_rows(request: pb.ExecuteRequest) -> int:
    """Rows that a round says to bring; what it really brings is checked later."""
    action = getattr(request, request.WhichOneof("action") or "", None)
    if action is None:
        return 0
    shape = action.hidden.shape or getattr(action, "squares", action.hidden).shape
    return shape[0] if shape else 0
