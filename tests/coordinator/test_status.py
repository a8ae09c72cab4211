"""What GetMesh says of workers that serve, spare ones and lost ones."""

from types import SimpleNamespace
from typing import Any

from coordinator.engine import Engine
from coordinator.planning.placement import WorkerReport
from coordinator.recovery import Recoveries, Recovery
from coordinator.request import Request
from coordinator.scheduler import Limits
from coordinator.status import MeshStatus
from coordinator.workers.roster import Survey
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


def status(fanout: Any, wanted: int = 2, obstacle: str = "") -> MeshStatus:
    engine = Engine(Limits(num_pages=9, page_tokens=4, max_running=1), vocabulary=10, context=30)
    engine.submit(Request("r", (1, 2, 3, 4, 5), 3))
    engine.submit(Request("r", (1,), 3))
    engine.scheduler.schedule()
    plan: Any = SimpleNamespace(digest=b"p" * 32, shards=(None, None))
    pool: Any = FakePool()
    resharding: Any = SimpleNamespace(present=plan, wanted=SimpleNamespace(shards=(None,) * wanted), obstacle=obstacle)
    return MeshStatus(pool, resharding, engine, Recoveries(reshards=3), fanout)


async def test_serving_spare_and_lost_workers_are_told_apart_in_the_order_given() -> None:
    mesh = await status(SimpleNamespace(epoch=6, addresses=("a:1", "b:1"))).report()
    assert (mesh.serving, mesh.epoch, mesh.num_shards, mesh.plan_digest) == (True, 6, 2, b"p" * 32)
    assert (mesh.wanted_shards, mesh.reshard_obstacle, mesh.recovery.reshards) == (2, "", 3)
    found = [(worker.address, worker.reachable, worker.serving, worker.shard, worker.error) for worker in mesh.workers]
    assert found == [
        ("a:1", True, True, 0, ""),
        ("b:1", False, False, 0, "worker b:1: connection refused"),
        ("c:1", True, False, 0, ""),
    ]
    first = mesh.workers[0]
    assert (first.version, first.device, first.num_threads, first.weights_bytes, first.kv_bytes) == ("1.2", "cpu", 3, 7, 5)


async def test_what_is_wanted_and_what_is_in_its_way() -> None:
    mesh = await status(None, wanted=4, obstacle="4 shards need 4 workers").report()
    assert (mesh.num_shards, mesh.wanted_shards, mesh.reshard_obstacle) == (2, 4, "4 shards need 4 workers")


async def test_load_is_counted() -> None:
    load = (await status(None).report()).load
    assert (load.running, load.waiting, load.used_pages, load.total_pages, load.page_tokens) == (1, 1, 2, 9, 4)
    assert (load.prompt_tokens, load.completion_tokens, load.steps) == (6, 0, 0)


async def test_broken_mesh_serves_nobody() -> None:
    mesh = await status(None).report()
    assert (mesh.serving, mesh.epoch) == (False, 0)
    assert not any(worker.serving for worker in mesh.workers)


async def test_what_broke_is_told_with_what_it_cost() -> None:
    found = status(None)
    quiet = (await found.report()).recovery
    assert (dict(quiet.failures), quiet.recoveries, quiet.last_failure) == ({}, 0, "")
    found.recoveries.failures.update(["WORKER_LOST", "WORKER_LOST", "WRONG_RESULT"])
    found.recoveries.count = 2
    found.recoveries.latest = Recovery("worker b:1 died", detect_ns=1, assemble_ns=2, canary_ns=3, replay_ns=4)
    told = (await found.report()).recovery
    assert (dict(told.failures), told.recoveries) == ({"WORKER_LOST": 2, "WRONG_RESULT": 1}, 2)
    assert (told.last_failure, told.last_detect_ns, told.last_assemble_ns) == ("worker b:1 died", 1, 2)
    assert (told.last_canary_ns, told.last_replay_ns) == (3, 4)
