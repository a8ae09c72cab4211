"""What `GetMesh` answers: workers, plan, load and health, asked for when somebody wants to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import generation_pb2

if TYPE_CHECKING:
    from coordinator.engine import Engine
    from coordinator.fanout import Fanout
    from coordinator.planning.placement import WorkerReport
    from coordinator.planning.plan import MeshPlan
    from coordinator.workers.pool import WorkerPool


@dataclass(slots=True)
class MeshStatus:
    """The mesh as it is now."""

    pool: WorkerPool
    plan: MeshPlan
    engine: Engine
    fanout: Fanout | None = None
    """None while no full mesh serves."""

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
        )

    def _worker(self, report: WorkerReport) -> generation_pb2.MeshWorker:
        described = report.description
        serving = self.fanout is not None and report.address in self.fanout.addresses
        return generation_pb2.MeshWorker(
            address=report.address,
            reachable=True,
            serving=serving,
            shard=described.held.shard,
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
        )

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
