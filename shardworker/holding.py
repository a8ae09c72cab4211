"""Which plan a worker holds, under which assignment, and who may replace it or drive it.

State changes on the event loop, at once: from the moment a load is accepted, rounds of the old plan are refused. Weights
come and go in the device's thread, after the rounds that were accepted before.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch

from protos import shardworker_pb2 as pb
from protos.digest import DIGEST_BYTES, mesh_digest, shard_digest
from protos.errors import InvalidArgument, PlanMismatch, ProtocolMismatch, StaleEpoch
from protos.rpc import PROTOCOL_VERSION
from shardworker.loader import Progress, load_weights
from shardworker.plan import check_plan
from shardworker.session import Session
from shardworker.shard import Shard
from shardworker.tally import RoundTally

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from shardworker.executor import Executor, Timed
    from shardworker.kernels.interface import Kernels
    from shardworker.source import Supplier

log = structlog.get_logger(__name__)

PROGRESS_INTERVAL_S = 0.2
MAX_COORDINATORS = 1024
"""Whose epochs are remembered; those not seen for longest are forgotten."""


class MeshShard(NamedTuple):
    """A plan's identity."""

    digest: bytes
    """Of the mesh, 32 bytes."""
    shard: int


class Owner(NamedTuple):
    """Who opened a session."""

    coordinator: bytes
    epoch: int


@dataclass(eq=False, slots=True)
class Loading:
    """A load on its way, and those who wait for it."""

    of: MeshShard
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiters: int = 0
    done: asyncio.Future[None] | None = None

    def report(self, progress: Progress) -> None:
        """Take note; called from the device's thread."""
        self.progress = progress


class Holding:
    """What the worker holds; empty at first."""

    def __init__(self, executor: Executor, kernels: Kernels, notify: Callable[[bool], None]) -> None:
        """Hold nothing.

        Args:
            executor: of the device.
            kernels: the device's arithmetic.
            notify: told, on the event loop, whenever the worker begins or ceases to serve steps.

        """
        self.executor = executor
        self.kernels = kernels
        self.assignment = 0
        self.sessions: dict[Session, Owner] = {}
        self.supplies: dict[MeshShard, list[Supplier]] = {}
        """Who sends bytes of checkpoints, by what is to be loaded from them; the first one is taken."""
        self.tally = RoundTally()
        # Highest epoch of each coordinator's process, the latest seen last.
        self._epochs: dict[bytes, int] = {}
        self.shard: Shard | None = None
        self._of: MeshShard | None = None
        self._loading: Loading | None = None
        self._notify = notify

    def held(self) -> pb.Held:
        """Describe it, as the answer to a mismatch."""
        if self._loading is not None:
            return pb.Held(state=pb.WORKER_STATE_LOADING, assignment=self.assignment)
        if self._of is None:
            return pb.Held(state=pb.WORKER_STATE_EMPTY, assignment=self.assignment)
        return pb.Held(
            state=pb.WORKER_STATE_LOADED, plan_digest=self._of.digest, shard=self._of.shard, assignment=self.assignment
        )

    def check_plan(self, digest: bytes) -> Shard:
        """Give the shard that serves this mesh.

        Raises:
            PlanMismatch: the worker holds another plan, or none.

        """
        if self.shard is None or self._of is None or self._of.digest != digest:
            found = pb.WorkerState.Name(self.held().state).removeprefix("WORKER_STATE_").lower()
            if self._of is not None:
                found = self._of.digest.hex()[:12]
            raise PlanMismatch(f"wanted plan {digest.hex()[:12]}, the worker holds {found}: load the plan")
        return self.shard

    def begin_epoch(self, coordinator: bytes, epoch: int) -> Callable[[], None]:
        """Count a coordinator's epoch from now on, and end its older sessions; the result frees their memory, on the device.

        Raises:
            StaleEpoch: the coordinator opened sessions of a higher one.

        """
        highest = self._epochs.get(coordinator, 0)
        if epoch < highest:
            raise StaleEpoch(f"epoch {epoch} is over, this coordinator is at {highest}: use the newer sessions")
        self._epochs.pop(coordinator, None)
        self._epochs[coordinator] = epoch
        while len(self._epochs) > MAX_COORDINATORS:
            del self._epochs[next(iter(self._epochs))]
        older = [stream for stream, owner in self.sessions.items() if owner.coordinator == coordinator and owner.epoch < epoch]
        for session in older:
            del self.sessions[session]
        return lambda: _drop(older)

    def is_over(self, owner: Owner) -> bool:
        """Whether the coordinator has opened newer sessions."""
        return owner.epoch < self._epochs.get(owner.coordinator, 0)

    def _check_assignment(self, assignment: int) -> None:
        if assignment < self.assignment:
            raise StaleEpoch(f"assignment {assignment} is over, the worker is at {self.assignment}: choose a higher one")

    async def load(self, request: pb.LoadRequest) -> AsyncGenerator[Progress]:
        """Become the shard of a plan; gives progress, and ends when the plan is held.

        Raises:
            MeshError: the request is refused, or loading failed and the worker is empty.

        """
        of = _check_load(request)
        if self._of == of:
            # Nothing changes hands, whatever the assignment.
            self.assignment = max(self.assignment, request.assignment)
            return
        self._check_assignment(request.assignment)
        supplier = next(iter(self.supplies.get(of, ())), None) if request.supplied else None
        if request.supplied and supplier is None:
            raise InvalidArgument("the plan's bytes are to be supplied, and nobody offers them: call Supply first")
        self.assignment = request.assignment
        loading = self._loading
        if loading is None or loading.of != of or loading.cancelled.is_set():
            loading = self._start(of, request, supplier)
        loading.waiters += 1
        try:
            while not await self._is_done(loading):
                yield loading.progress
        finally:
            loading.waiters -= 1
            if loading.waiters == 0:
                loading.cancelled.set()
        yield loading.progress

    async def release(self, assignment: int) -> None:
        """Hold nothing; returns when the memory is free.

        Raises:
            StaleEpoch: a lower assignment.

        """
        self._check_assignment(assignment)
        self.assignment = assignment
        drop = self._let_go()
        await self.executor.submit(drop)

    def cancel_loading(self) -> None:
        """Give up a load that is on its way."""
        if self._loading is not None:
            self._loading.cancelled.set()

    def _let_go(self) -> Callable[[], None]:
        """Stop serving now; the result frees the memory, in the device's thread."""
        self.cancel_loading()
        self._loading = self._of = self.shard = None
        sessions = tuple(self.sessions)
        self._notify(False)
        return lambda: _drop(sessions)

    def _start(self, of: MeshShard, request: pb.LoadRequest, supplier: Supplier | None) -> Loading:
        drop = self._let_go()
        loading = self._loading = Loading(of)
        plan, directory, kernels = request.plan, request.directory, self.kernels

        def job() -> Shard:
            drop()
            try:
                weights, num_bytes = load_weights(
                    plan, directory, kernels, loading.report, loading.cancelled.is_set, supplier=supplier
                )
            except BaseException as error:
                _forget(error)
                raise
            return Shard(plan, weights, num_bytes, kernels)

        loading.done = asyncio.ensure_future(self._finish(loading, self.executor.submit(job)))
        # The last waiter may have left.
        loading.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        return loading

    async def _finish(self, loading: Loading, job: asyncio.Future[Timed[Shard]]) -> None:
        try:
            shard = (await job).result
        finally:
            current = self._loading is loading
            if current:
                self._loading = None
        if current:
            self.shard, self._of = shard, loading.of
            self._notify(True)
            log.info("plan loaded", shard=loading.of.shard, assignment=self.assignment, weights_bytes=shard.weights_bytes)

    async def _is_done(self, loading: Loading) -> bool:
        """Wait for the end of a load, but no longer than progress may be silent."""
        if loading.done is None:
            raise TypeError("a load that was not started")
        done, _ = await asyncio.wait({loading.done}, timeout=PROGRESS_INTERVAL_S)
        if done:
            loading.done.result()
            if self._of != loading.of:
                raise PlanMismatch("the load was given up: another plan came")
        return bool(done)


def _drop(sessions: Iterable[Session]) -> None:
    for session in sessions:
        session.drop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_protocol(version: int) -> None:
    """Refuse a coordinator of another protocol.

    Raises:
        ProtocolMismatch: likewise.

    """
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the coordinator speaks protocol {version}, this worker {PROTOCOL_VERSION}: upgrade the older one"
        )


def _forget(error: BaseException) -> None:
    """Clear the frames that an error passed: half-loaded weights would live as long as it is looked at."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _check_load(request: pb.LoadRequest) -> MeshShard:
    check_protocol(request.protocol_version)
    if request.assignment == 0:
        raise InvalidArgument("assignment: wanted at least 1, found 0")
    plan, digests = request.plan, request.shard_digests
    if len(digests) != plan.num_shards or any(len(digest) != DIGEST_BYTES for digest in digests):
        raise InvalidArgument(f"shard_digests: wanted {plan.num_shards} of {DIGEST_BYTES} bytes, found {len(digests)}")
    check_plan(plan)
    if digests[plan.shard] != shard_digest(plan):
        raise InvalidArgument(f"shard_digests: number {plan.shard} is not this plan's")
    return MeshShard(mesh_digest(digests), plan.shard)
