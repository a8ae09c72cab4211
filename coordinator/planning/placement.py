"""Which worker becomes which shard. Pure: reports in, addresses out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.planning.slicing import most_shards
from protos.errors import TopologyError
from protos.shardworker_pb2 import WORKER_STATE_LOADED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.models.spec import ModelSpec
    from coordinator.planning.plan import MeshPlan
    from protos.shardworker_pb2 import DescribeResponse

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker and its answer to `Describe`."""

    address: str
    description: DescribeResponse

    @property
    def available_bytes(self) -> int:
        """What the worker could hold if it dropped what it holds now."""
        return self.description.memory_free_bytes + self.description.weights_bytes + self.description.kv_bytes

    def holds(self, plan: MeshPlan, shard: int) -> bool:
        """Whether the worker has that shard of that plan loaded."""
        held = self.description.held
        plans = [(former.plan_digest, former.shard) for former in held.former]
        if held.state == WORKER_STATE_LOADED:
            plans.append((held.plan_digest, held.shard))
        return (plan.digest, shard) in plans

    def is_idle_with_another(self, plan: MeshPlan) -> bool:
        """Whether the worker holds some other plan, alone or beside this one, and nobody has a session there."""
        held = self.description.held
        has_another = held.state == WORKER_STATE_LOADED and (held.plan_digest != plan.digest or len(held.former) > 0)
        return has_another and not self.description.num_sessions


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds what."""

    shards: tuple[str, ...]
    """Address of each shard's worker, in shard order."""
    spares: tuple[str, ...]
    """Workers left over, in the order given."""


def place(plan: MeshPlan, workers: Sequence[WorkerReport]) -> Placement:
    """Choose a worker for each shard.

    A worker that holds a shard of this plan keeps it. The others go, the biggest shard first, to the first worker in the order
    given whose memory takes the weights; if any assignment fits, this one does, for what takes a big shard takes a small one.

    Raises:
        TopologyError: a worker twice, too few of them, or too little memory.

    """
    num_shards = len(plan.shards)
    _check_workers(num_shards, workers)
    chosen = holders(plan, workers)
    kept = {worker.address for worker in chosen.values()}
    free = [worker for worker in workers if worker.address not in kept]
    waiting = [shard for shard in range(num_shards) if shard not in chosen]
    for shard in sorted(waiting, key=lambda shard: -plan.weight_bytes[shard]):
        worker = next((worker for worker in free if worker.available_bytes >= plan.weight_bytes[shard]), None)
        if worker is None:
            raise _too_little_memory(shard, plan, free)
        chosen[shard] = worker
        free.remove(worker)
    shards = tuple(chosen[shard].address for shard in range(num_shards))
    return Placement(shards, tuple(worker.address for worker in free))


def holders(plan: MeshPlan, workers: Sequence[WorkerReport]) -> dict[int, WorkerReport]:
    """Give the first worker that holds each shard of the plan already; shards that nobody holds are left out."""
    found: dict[int, WorkerReport] = {}
    for shard in range(len(plan.shards)):
        if holder := next((worker for worker in workers if worker.holds(plan, shard)), None):
            found[shard] = holder
    return found


def default_shards(num_workers: int, spec: ModelSpec) -> int:
    """Give the largest power of two that the workers and the model allow.

    Raises:
        TopologyError: there is no worker.

    """
    if num_workers < 1:
        raise TopologyError("a mesh needs at least 1 worker, found none")
    return int(2 ** (min(num_workers, most_shards(spec)).bit_length() - 1))


def _check_workers(num_shards: int, workers: Sequence[WorkerReport]) -> None:
    address, count = Counter(worker.address for worker in workers).most_common(1)[0] if workers else ("", 0)
    if count > 1:
        raise TopologyError(f"worker {address} is listed {count} times: list each worker once")
    if len(workers) < num_shards:
        raise TopologyError(
            f"{num_shards} shards need {num_shards} workers, found {len(workers)}: add workers or use fewer shards"
        )


def _too_little_memory(shard: int, plan: MeshPlan, free: Sequence[WorkerReport]) -> TopologyError:
    best = max(free, key=lambda worker: worker.available_bytes)
    return TopologyError(
        f"worker {best.address} has {_gib(best.available_bytes)} GiB free, its slice (shard {shard}) needs "
        f"{_gib(plan.weight_bytes[shard])} GiB, and no other has more: add workers or quantize"
    )


def _gib(num_bytes: int) -> str:
    # Enough digits to tell a small model's numbers apart.
    return f"{num_bytes / _GIB:.1f}" if num_bytes >= _GIB else f"{num_bytes / _GIB:.4f}"
