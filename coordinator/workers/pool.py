"""The workers that a coordinator was given, and how a full mesh is made of them.

Who gets which shard is decided by `coordinator.planning.placement`; this file acts: describe, load, open.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from coordinator.fanout import Fanout
from coordinator.planning.placement import WorkerReport, place
from coordinator.workers.client import WorkerClient
from protos import rpc
from protos.errors import MeshError, ProtocolMismatch, WorkerLost
from protos.shardworker_pb2 import WORKER_STATE_LOADED, LoadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from coordinator.planning.placement import Placement
    from coordinator.planning.plan import MeshPlan
    from coordinator.rounds import RoundObserver

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Survey:
    """What the workers said of themselves."""

    reports: tuple[WorkerReport, ...]
    failures: dict[str, MeshError]
    """Why the others cannot be used, by address."""


@dataclass(frozen=True, slots=True)
class LoadEvent:
    """A worker's progress."""

    shard: int
    address: str
    loaded_bytes: int
    total_bytes: int


class WorkerPool:
    """Clients of all workers, serving ones and spares alike."""

    def __init__(self, addresses: Sequence[str], observer: RoundObserver | None = None) -> None:
        """Make the clients; nothing is sent yet.

        Args:
            addresses: distinct, each checked by `protos.rpc.check_address`.
            observer: told of each round of the meshes made here.

        """
        self.clients = {address: WorkerClient(address) for address in addresses}
        self._observer = observer
        self._identity = os.urandom(16)
        self._epoch = 0

    async def survey(self, *, wait_for_ready: bool) -> Survey:
        """Ask all workers what they are and hold."""
        answers = await asyncio.gather(
            *(client.describe(wait_for_ready=wait_for_ready) for client in self.clients.values()),
            return_exceptions=True,
        )
        reports: list[WorkerReport] = []
        failures: dict[str, MeshError] = {}
        for address, answer in zip(self.clients, answers, strict=True):
            if isinstance(answer, MeshError):
                failures[address] = answer
            elif isinstance(answer, BaseException):
                raise answer
            elif answer.protocol_version != rpc.PROTOCOL_VERSION:
                failures[address] = ProtocolMismatch(
                    f"worker {address} (shardmesh {answer.version}) speaks protocol {answer.protocol_version}, this "
                    f"coordinator {rpc.PROTOCOL_VERSION}: run the same version on both"
                )
            else:
                reports.append(WorkerReport(address, answer))
        return Survey(tuple(reports), failures)

    async def assemble(
        self,
        plan: MeshPlan,
        directory: Path | None,
        num_pages: int,
        on_progress: Callable[[LoadEvent], None],
    ) -> Fanout:
        """Make a full mesh: place the shards, load them, open the sessions.

        Args:
            plan: what to serve.
            directory: of the model's files, as the workers see it; None with random weights.
            num_pages: KV pages of each shard.
            on_progress: called for each step of loading.

        Raises:
            MeshError: too few workers, or one of those needed refuses or dies.

        """
        survey = await self.survey(wait_for_ready=False)
        if len(survey.reports) < len(plan.shards):
            survey = await self.survey(wait_for_ready=True)
        for address, failure in survey.failures.items():
            log.warning("worker cannot be used", worker=address, error=str(failure))
        if len(survey.reports) < len(plan.shards) and survey.failures:
            raise next(iter(survey.failures.values()))
        placement = place(plan, survey.reports)
        assignment = choose_assignment(plan, placement, survey.reports)
        requests = [
            LoadRequest(
                protocol_version=rpc.PROTOCOL_VERSION,
                plan=shard,
                shard_digests=plan.shard_digests,
                assignment=assignment,
                directory=str(directory) if directory else "",
            )
            for shard in plan.shards
        ]
        await _all(self._load(address, request, on_progress) for address, request in zip(placement.shards, requests, strict=True))
        self._epoch += 1
        fanout = Fanout(
            [self.clients[address].execute() for address in placement.shards], plan.digest, self._epoch, self._observer
        )
        try:
            await fanout.open(self._identity, num_pages)
        except BaseException:
            fanout.close()
            raise
        return fanout

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(client.close() for client in self.clients.values()))

    async def _load(self, address: str, request: LoadRequest, on_progress: Callable[[LoadEvent], None]) -> None:
        shard = request.plan.shard
        async with aclosing(self.clients[address].load(request)) as responses:
            async for response in responses:
                if response.WhichOneof("event") == "loaded":
                    held = response.loaded.weights_bytes
                    on_progress(LoadEvent(shard, address, held, held))
                    return
                progress = response.progress
                on_progress(LoadEvent(shard, address, progress.loaded_bytes, progress.total_bytes))
        raise WorkerLost(f"worker {address} ended loading without an answer")


def choose_assignment(plan: MeshPlan, placement: Placement, reports: Iterable[WorkerReport]) -> int:
    """Keep the assignment of a mesh that holds the plan already; otherwise plans are handed out anew under a higher one."""
    held = {report.address: report.description.held for report in reports}
    highest = max((state.assignment for state in held.values()), default=0)
    complete = all(
        (held[address].state, held[address].plan_digest, held[address].shard) == (WORKER_STATE_LOADED, plan.digest, shard)
        for shard, address in enumerate(placement.shards)
    )
    return highest if complete else highest + 1


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run side by side; the first failure cancels the rest and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except* MeshError as errors:
        raise errors.exceptions[0] from None
