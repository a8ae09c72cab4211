"""What GetMesh says of workers that serve, spare ones and lost ones."""

from types import SimpleNamespace
from typing import Any

from coordinator.engine import Engine
from coordinator.planning.placement import WorkerReport
from coordinator.request import Request
from coordinator.scheduler import Limits
from coordinator.status import MeshStatus
from coordinator.workers.pool import Survey
from protos.errors import WorkerLost
from protos.shardworker_pb2 import WORKER_STATE_LOADED, DescribeResponse, Held


def described(shard: int) -> DescribeResponse:
    state = Held(state=WORKER_STATE_LOADED, plan_digest=b"p" * 32, shard=shard, assignment=1)
    return DescribeResponse(
        version="1.2", held=state, device="cpu", num_threads=3, memory_free_bytes=10, weights_bytes=7, kv_bytes=5
    )


class FakePool:
    def __init__(self) -> None:
        self.clients = {"a:1": None, "b:1": None, "c:1": None}

    async def survey(self, *, wait_for_ready: bool) -> Survey:
        # A person waits for the answer: nobody is waited for.
        assert not wait_for_ready
        reports = (WorkerReport("c:1", described(0)), WorkerReport("a:1", described(1)))
        return Survey(reports, {"b:1": WorkerLost("worker b:1: connection refused")})


def status(fanout: Any) -> MeshStatus:
    engine = Engine(Limits(num_pages=9, page_tokens=4, max_running=1), vocabulary=10, context=30)
    engine.submit(Request("r", (1, 2, 3, 4, 5), 3))
    engine.submit(Request("r", (1,), 3))
    engine.scheduler.schedule()
    plan: Any = SimpleNamespace(digest=b"p" * 32, shards=(None, None))
    pool: Any = FakePool()
    return MeshStatus(pool, plan, engine, fanout)


async def test_serving_spare_and_lost_workers_are_told_apart_in_the_order_given() -> None:
    mesh = await status(SimpleNamespace(epoch=6, addresses=("a:1", "b:1"))).report()
    assert (mesh.serving, mesh.epoch, mesh.num_shards, mesh.plan_digest) == (True, 6, 2, b"p" * 32)
    found = [(worker.address, worker.reachable, worker.serving, worker.shard, worker.error) for worker in mesh.workers]
    assert found == [
        ("a:1", True, True, 1, ""),
        ("b:1", False, False, 0, "worker b:1: connection refused"),
        ("c:1", True, False, 0, ""),
    ]
    first = mesh.workers[0]
    assert (first.version, first.device, first.num_threads, first.weights_bytes, first.kv_bytes) == ("1.2", "cpu", 3, 7, 5)


async def test_load_is_counted() -> None:
    load = (await status(None).report()).load
    assert (load.running, load.waiting, load.used_pages, load.total_pages, load.page_tokens) == (1, 1, 2, 9, 4)
    assert (load.prompt_tokens, load.completion_tokens, load.steps) == (6, 0, 0)


async def test_broken_mesh_serves_nobody() -> None:
    mesh = await status(None).report()
    assert (mesh.serving, mesh.epoch) == (False, 0)
    assert not any(worker.serving for worker in mesh.workers)
