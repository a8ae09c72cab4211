"""What `GetMesh` answers: workers, plan, load and health, asked for when somebody wants to know."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import generation_pb2

if TYPE_CHECKING:
    from coordinator.engine import Engine
    from coordinator.fanout import Fanout
    from coordinator.metrics import Metrics
    from coordinator.planning.placement import WorkerReport
    from coordinator.planning.plan import MeshPlan
    from coordinator.recovery import Recoveries
    from coordinator.resharding import Resharding
    from coordinator.workers.pool import WorkerPool

HOTTEST = 16
"""Experts that are told of."""


@dataclass(slots=True)
class MeshStatus:
    """The mesh as it is now."""

    pool: WorkerPool
    resharding: Resharding
    engine: Engine
    recoveries: Recoveries
    fanout: Fanout | None = None
    """None while no full mesh serves."""
    metrics: Metrics | None = None
    """None where rounds and experts are not counted."""

    @property
    def plan(self) -> MeshPlan:
        """Of the mesh that serves, or served last, or is to serve first."""
        return self.resharding.present

    @property
    def wanted_shards(self) -> int:
        """What the mesh is to be cut into."""
        return len(self.resharding.wanted.shards)

    async def report(self) -> generation_pb2.GetMeshResponse:
        """Ask all workers and add up."""
        survey = await self.pool.survey(wait_for_ready=False)
        workers = {address: generation_pb2.MeshWorker(address=address) for address in self.pool.clients}
        for report in survey.reports:
            workers[report.address].CopyFrom(self._worker(report))
        for address, error in survey.failures.items():
            workers[address].error = str(error)
        return generation_pb2.GetMeshResponse(
            serving=self.fanout is not None,
            plan_digest=self.plan.digest,
            epoch=self.fanout.epoch if self.fanout else 0,
            num_shards=len(self.plan.shards),
            workers=workers.values(),
            load=self._load(),
            recovery=self._recovery(),
            proven_ago_ns=time.monotonic_ns() - self.engine.proven_ns if self.engine.proven_ns else 0,
            hottest_experts=self._hottest_experts(),
            wanted_shards=self.wanted_shards,
            reshard_obstacle=self.resharding.obstacle,
        )

    def _worker(self, report: WorkerReport) -> generation_pb2.MeshWorker:
        described = report.description
        addresses = self.fanout.addresses if self.fanout else ()
        serving = report.address in addresses
        return generation_pb2.MeshWorker(
            address=report.address,
            reachable=True,
            serving=serving,
            # Not what it holds: that may be the shard of a mesh that is to come.
            shard=addresses.index(report.address) if serving else 0,
            version=described.version,
            device=described.device,
            kernels=described.kernels,
            num_threads=described.num_threads,
            memory_total_bytes=described.memory_total_bytes,
            memory_free_bytes=described.memory_free_bytes,
            weights_bytes=described.weights_bytes,
            kv_bytes=described.kv_bytes,
            peak_rss_bytes=described.peak_rss_bytes,
            plan_digest=described.held.plan_digest,
            rounds=self._rounds(report.address),
        )

    def _rounds(self, address: str) -> generation_pb2.MeshWorkerRounds:
        if self.metrics is None:
            return generation_pb2.MeshWorkerRounds()
        tally = self.metrics.tally.worker(address)
        return generation_pb2.MeshWorkerRounds(
            compute_ns=tally.compute_ns, queue_ns=tally.queue_ns, wire_ns=tally.wire_ns, wait_ns=tally.wait_ns
        )

    def _hottest_experts(self) -> list[generation_pb2.ExpertHeat]:
        hottest = self.metrics.heat.hottest(HOTTEST) if self.metrics else []
        return [
            generation_pb2.ExpertHeat(layer=one.layer, expert=one.expert, share=one.share, over_mean=one.over_mean)
            for one in hottest
        ]

    def _load(self) -> generation_pb2.MeshLoad:
        scheduler, statistics = self.engine.scheduler, self.engine.statistics
        return generation_pb2.MeshLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_pages=scheduler.pool.num_used,
            total_pages=scheduler.pool.num_pages,
            page_tokens=scheduler.pool.page_tokens,
            steps=statistics.steps,
            prompt_tokens=statistics.prompt_tokens,
            completion_tokens=statistics.completion_tokens,
            preemptions=scheduler.num_preemptions,
        )

    def _recovery(self) -> generation_pb2.MeshRecovery:
        message = generation_pb2.MeshRecovery(
            failures=self.recoveries.failures, recoveries=self.recoveries.count, reshards=self.recoveries.reshards
        )
        if latest := self.recoveries.latest:
            message.last_failure = latest.failure
            message.last_detect_ns, message.last_assemble_ns = latest.detect_ns, latest.assemble_ns
            message.last_canary_ns, message.last_replay_ns = latest.canary_ns, latest.replay_ns
        return message
