"""Which plans a worker holds, under which assignment, and who may replace them or drive them.

A worker is one shard, of the plan that came last. When a mesh is cut anew, the plan before it is held too, until nobody has a
session on it and the last one was served from: whoever is served by it goes on meanwhile, and comes back if the next mesh fails.

State changes on the event loop, at once: from the moment a load is accepted, rounds of a plan that it replaces are refused.
Memory is freed on the device, after the rounds that were accepted before; weights are read in a thread of their own.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch

from protos import shardworker_pb2 as pb
from protos.errors import InvalidArgument, PlanMismatch, StaleEpoch
from shardworker.loading import Loading, MeshShard, check_load
from shardworker.tally import RoundTally

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from shardworker.executor import Executor
    from shardworker.kernels.interface import Kernels
    from shardworker.loader import Progress
    from shardworker.session import Session
    from shardworker.shard import Shard
    from shardworker.source import Supplier

log = structlog.get_logger(__name__)

PROGRESS_INTERVAL_S = 0.2
MAX_COORDINATORS = 1024
"""Whose epochs are remembered; those not seen for longest are forgotten."""


class Owner(NamedTuple):
    """Who opened a session, on which plan."""

    coordinator: bytes
    epoch: int
    plan_digest: bytes


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
        # Highest epoch of each coordinator's mesh, the latest seen last.
        self._epochs: dict[bytes, int] = {}
        # By the mesh's digest, the one that came last at the end.
        self._shards: dict[bytes, Shard] = {}
        # Those that were served from since they are held.
        self._opened: set[bytes] = set()
        self._loading: Loading | None = None
        self._notify = notify

    @property
    def weights_bytes(self) -> int:
        """Of all plans held."""
        return sum(shard.weights_bytes for shard in self._shards.values())

    def held(self) -> pb.Held:
        """Describe it, as the answer to a mismatch."""
        if not self._shards:
            state = pb.WORKER_STATE_LOADING if self._loading else pb.WORKER_STATE_EMPTY
            return pb.Held(state=state, assignment=self.assignment)
        *former, (digest, shard) = self._shards.items()
        return pb.Held(
            state=pb.WORKER_STATE_LOADED,
            plan_digest=digest,
            shard=shard.plan.shard,
            assignment=self.assignment,
            former=[pb.FormerPlan(plan_digest=digest, shard=shard.plan.shard) for digest, shard in former],
        )

    def check_plan(self, digest: bytes) -> Shard:
        """Give the shard that serves this mesh.

        Raises:
            PlanMismatch: the worker holds another plan, or none.

        """
        if shard := self._shards.get(digest):
            return shard
        found = ", ".join(held.hex()[:12] for held in reversed(self._shards))
        found = found or pb.WorkerState.Name(self.held().state).removeprefix("WORKER_STATE_").lower()
        raise PlanMismatch(f"wanted plan {digest.hex()[:12]}, the worker holds {found}: load the plan")

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

    def begin(self, session: Session, owner: Owner) -> None:
        """Take note of a session that was opened: what its plan takes the place of may go."""
        self.sessions[session] = owner
        self._opened.add(owner.plan_digest)
        self._retire()

    def end(self, session: Session) -> None:
        """Free what a session holds, after the round that may still be running, and a former plan that nobody uses any more."""
        self.sessions.pop(session, None)
        self.executor.submit(session.drop)
        self._retire()

    async def load(self, request: pb.LoadRequest) -> AsyncGenerator[Progress]:
        """Become the shard of a plan; gives progress, and ends when the plan is held.

        Raises:
            MeshError: the request is refused, or loading failed: what was to be replaced is gone, what was not serves on.

        """
        of = check_load(request)
        if self._holds(of):
            # Nothing changes hands, whatever the assignment.
            self.assignment = max(self.assignment, request.assignment)
            self._shards[of.digest] = self._shards.pop(of.digest)
            self._retire()
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
        self.cancel_loading()
        self._loading = None
        await self.executor.submit(self._let_go(list(self._shards)))

    def cancel_loading(self) -> None:
        """Give up a load that is on its way."""
        if self._loading is not None:
            self._loading.cancelled.set()

    def _holds(self, of: MeshShard) -> bool:
        shard = self._shards.get(of.digest)
        return shard is not None and shard.plan.shard == of.shard

    def _check_assignment(self, assignment: int) -> None:
        if assignment < self.assignment:
            raise StaleEpoch(f"assignment {assignment} is over, the worker is at {self.assignment}: choose a higher one")

    def _let_go(self, digests: Iterable[bytes]) -> Callable[[], None]:
        """Stop serving these plans now; the result frees the memory, on the device."""
        gone = {digest: self._shards.pop(digest) for digest in digests if digest in self._shards}
        self._opened -= gone.keys()
        # They know that they are over when they are dropped.
        sessions = [session for session, owner in self.sessions.items() if owner.plan_digest in gone]
        if not self._shards:
            self._notify(False)
        return lambda: _drop(sessions, gone)

    def _retire(self) -> None:
        """Let go of former plans on which there is no session, once the latest one has had some."""
        kept = list(self._shards)[-1:]
        if not self._opened.issuperset(kept):
            # Its mesh may never come to be: the one before it is still what is served.
            kept = list(self._shards)[-2:]
        if unused := [digest for digest in self._unused() if digest not in kept]:
            log.info("former plans dropped", plans=[digest.hex()[:12] for digest in unused])
            self.executor.submit(self._let_go(unused))

    def _unused(self) -> list[bytes]:
        """Plans on which there is no session."""
        used = {owner.plan_digest for owner in self.sessions.values()}
        return [digest for digest in self._shards if digest not in used]

    def _start(self, of: MeshShard, request: pb.LoadRequest, supplier: Supplier | None) -> Loading:
        self.cancel_loading()
        # A worker is one shard of a mesh.
        drop = self._let_go([of.digest, *self._unused()] if request.beside else list(self._shards))
        loading = self._loading = Loading(of)
        job = self.executor.beside(lambda on_device: loading.run(request, self.kernels, supplier, drop, on_device))
        loading.done = asyncio.ensure_future(self._finish(loading, job))
        # The last waiter may have left.
        loading.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        return loading

    async def _finish(self, loading: Loading, job: asyncio.Future[Shard]) -> None:
        try:
            shard = await job
        finally:
            current = self._loading is loading
            if current:
                self._loading = None
        # It may have been given up in its last moment.
        if current and not loading.cancelled.is_set():
            self._shards[loading.of.digest] = shard
            self._notify(True)
            log.info("plan loaded", shard=loading.of.shard, assignment=self.assignment, weights_bytes=shard.weights_bytes)
            self._retire()

    async def _is_done(self, loading: Loading) -> bool:
        """Wait for the end of a load, but no longer than progress may be silent."""
        if loading.done is None:
            raise TypeError("a load that was not started")
        done, _ = await asyncio.wait({loading.done}, timeout=PROGRESS_INTERVAL_S)
        if done:
            loading.done.result()
            if not self._holds(loading.of):
                raise PlanMismatch("the load was given up: another plan came")
        return bool(done)


def _drop(sessions: Iterable[Session], shards: dict[bytes, Shard] | None = None) -> None:
    for session in sessions:
        session.drop()
    if shards:
        shards.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
