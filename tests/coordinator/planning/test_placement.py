from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.models.config import Config
from coordinator.models.registry import describe
from coordinator.planning.placement import Placement, WorkerReport, default_shards, place
from coordinator.planning.plan import MeshPlan
from coordinator.planning.slicing import most_shards
from protos import plan_pb2 as pb
from protos.errors import TopologyError
from protos.shardworker_pb2 import WORKER_STATE_LOADED, WORKER_STATE_LOADING, DescribeResponse, FormerPlan, Held

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
DIGEST = b"d" * 32
GIB = 2**30


def mesh(*weight_bytes: int) -> MeshPlan:
    count = len(weight_bytes)
    return MeshPlan(
        tuple(pb.ShardPlan(shard=shard) for shard in range(count)), (b"",) * count, DIGEST, weight_bytes, (1,) * count
    )


def worker(
    address: str,
    free: int,
    held: int | None = None,
    *,
    digest: bytes = DIGEST,
    state: Any = WORKER_STATE_LOADED,
    weights: int = 0,
) -> WorkerReport:
    found = Held() if held is None else Held(state=state, plan_digest=digest, shard=held)
    return WorkerReport(address, DescribeResponse(held=found, memory_free_bytes=free, weights_bytes=weights))


def test_equal_workers_are_taken_in_order() -> None:
    workers = [worker(name, 100) for name in "abcd"]
    assert place(mesh(10, 10), workers) == Placement(("a", "b"), ("c", "d"))


def test_worker_keeps_the_shard_that_it_holds() -> None:
    workers = [worker("a", 100), worker("b", 0, held=2), worker("c", 0, held=0), worker("d", 100)]
    assert place(mesh(10, 10, 10), workers) == Placement(("c", "a", "b"), ("d",))


def test_of_two_holders_the_first_keeps_it() -> None:
    workers = [worker("a", 100, held=1), worker("b", 100, held=1)]
    assert place(mesh(10, 10), workers) == Placement(("b", "a"), ())


@pytest.mark.parametrize(
    "stale",
    [worker("b", 100, held=1, digest=b"x" * 32), worker("b", 100, held=1, state=WORKER_STATE_LOADING), worker("b", 100, held=7)],
)
def test_holder_of_something_else_has_no_claim(stale: WorkerReport) -> None:
    assert place(mesh(10, 10), [stale, worker("a", 100)]) == Placement(("b", "a"), ())


def test_a_former_plan_is_held_too() -> None:
    former = [FormerPlan(plan_digest=DIGEST, shard=1)]
    held = Held(state=WORKER_STATE_LOADED, plan_digest=b"x" * 32, shard=0, former=former)
    both = WorkerReport("a", DescribeResponse(held=held, memory_free_bytes=0))
    assert place(mesh(10, 10), [both, worker("b", 100)]) == Placement(("b", "a"), ())


def test_memory_of_an_old_plan_counts_as_free() -> None:
    workers = [worker("a", 5, held=0, digest=b"x" * 32, weights=10)]
    assert place(mesh(12), workers).shards == ("a",)


def test_big_shards_go_where_they_fit() -> None:
    workers = [worker("small", 10), worker("big", 20), worker("middle", 15)]
    assert place(mesh(9, 18, 14), workers).shards == ("small", "big", "middle")


@given(
    needs=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    free=st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
def test_an_assignment_is_found_if_there_is_one(needs: list[int], free: list[int]) -> None:
    possible = any(
        all(need <= room for need, room in zip(needs, rooms, strict=False)) for rooms in permutations(free, len(needs))
    )
    workers = [worker(str(number), room) for number, room in enumerate(free)]
    if not possible:
        with pytest.raises(TopologyError):
            place(mesh(*needs), workers)
        return
    placement = place(mesh(*needs), workers)
    assert all(free[int(address)] >= need for address, need in zip(placement.shards, needs, strict=True))
    assert sorted([*placement.shards, *placement.spares]) == sorted(report.address for report in workers)


def test_too_little_memory_is_said_with_numbers() -> None:
    workers = [worker("10.0.0.1:7000", int(12.5 * GIB)), worker("10.0.0.2:7000", int(14.2 * GIB))]
    with pytest.raises(TopologyError) as error:
        place(mesh(int(17.9 * GIB), GIB), workers)
    assert str(error.value) == (
        "worker 10.0.0.2:7000 has 14.2 GiB free, its slice (shard 0) needs 17.9 GiB, and no other has more: "
        "add workers or quantize"
    )


def test_too_few_workers_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"^4 shards need 4 workers, found 1: add workers or use fewer shards$"):
        place(mesh(1, 1, 1, 1), [worker("a", 100)])
    with pytest.raises(TopologyError, match=r"^1 shards need 1 workers, found 0"):
        place(mesh(1), [])


def test_worker_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"^worker a is listed 2 times: list each worker once$"):
        place(mesh(1), [worker("a", 100), worker("b", 100), worker("a", 100)])


@pytest.mark.parametrize(
    ("model", "workers", "shards"),
    [("smollm2-135m", 1, 1), ("smollm2-135m", 3, 2), ("smollm2-135m", 7, 4), ("smollm2-135m", 64, 8), ("intellect-3", 100, 32)],
)
def test_default_is_the_largest_power_of_two(model: str, workers: int, shards: int) -> None:
    spec = describe(Config("config.json", json.loads((CONFIGS / f"{model}.json").read_text())))
    assert default_shards(workers, spec) == shards
    assert shards <= most_shards(spec)


def test_default_without_workers_is_refused() -> None:
    spec = describe(Config("config.json", json.loads((CONFIGS / "smollm2-135m.json").read_text())))
    with pytest.raises(TopologyError, match=r"at least 1 worker, found none"):
        default_shards(0, spec)
