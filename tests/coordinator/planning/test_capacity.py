"""How many KV pages fit beside the weights."""

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.planning.capacity import DEFAULT_KV_TOKENS, check_beside, kv_pages
from coordinator.planning.placement import Placement, WorkerReport
from protos.errors import OutOfMemory
from protos.shardworker_pb2 import WORKER_STATE_LOADED, DescribeResponse, Held

# 1000 bytes of weights and 10 bytes of KV a token on the bigger shard.
PLAN: Any = SimpleNamespace(
    weight_bytes=(1000, 600), kv_bytes_per_token=(5, 10), digest=b"p" * 32, shards=(SimpleNamespace(page_tokens=16),) * 2
)


def worker(address: str, free: int, weights: int = 0) -> WorkerReport:
    return WorkerReport(address, DescribeResponse(memory_free_bytes=free, weights_bytes=weights))


def test_default_is_the_usual_where_there_is_plenty() -> None:
    assert kv_pages(PLAN, [worker("a:1", 10**9)], 16, None) * 16 == DEFAULT_KV_TOKENS


def test_default_takes_half_of_what_is_left_where_memory_is_short() -> None:
    # 3200 bytes left are 20 pages of 160 bytes.
    assert kv_pages(PLAN, [worker("a:1", 4200)], 16, None) == 10


def test_smallest_worker_decides() -> None:
    assert kv_pages(PLAN, [worker("a:1", 10**9), worker("b:1", 4200)], 16, None) == 10


def test_workers_of_one_host_share_its_memory() -> None:
    assert kv_pages(PLAN, [worker("a:1", 8400), worker("a:2", 8400)], 16, None) == 10
    assert kv_pages(PLAN, [worker("unix:/x/1", 8400), worker("unix:/y/2", 8400)], 16, None) == 10
    assert kv_pages(PLAN, [worker("[::1]:1", 8400), worker("[::2]:2", 8400)], 16, None) == 23


def test_weights_that_are_held_do_not_count_against_their_own_reload() -> None:
    before = kv_pages(PLAN, [worker("a:1", 8400), worker("a:2", 8400)], 16, None)
    after = kv_pages(PLAN, [worker("a:1", 6800, 1000), worker("a:2", 6800, 600)], 16, None)
    assert after == before


def test_wanted_tokens_round_up_to_pages() -> None:
    assert kv_pages(PLAN, [worker("a:1", 10**9)], 16, 17) == 2


def test_single_page_that_fits_is_taken() -> None:
    assert kv_pages(PLAN, [worker("a:1", 1160)], 16, None) == 1


@pytest.mark.parametrize(
    ("free", "wanted", "text"),
    [
        (900, None, "room for 0 tokens of KV cache; 16 are wanted"),
        (1159, None, "room for 0 tokens of KV cache; 16 are wanted"),
        (4200, 321, "room for 320 tokens of KV cache; 336 are wanted: lower --kv-tokens, add workers or quantize"),
    ],
)
def test_too_little_memory_is_refused_with_the_numbers(free: int, wanted: int | None, text: str) -> None:
    with pytest.raises(OutOfMemory, match=text):
        kv_pages(PLAN, [worker("a:1", free)], 16, wanted)


@pytest.mark.parametrize(
    ("workers", "fits"),
    [
        # Two pages of KV are 160 and 320 bytes.
        ([worker("a:1", 1160, 500), worker("b:1", 920, 500)], True),
        ([worker("a:1", 1159, 5000), worker("b:1", 920, 5000)], False),
        ([worker("a:1", 1160), worker("b:1", 919)], False),
        # On one host together.
        ([worker("a:1", 2080), worker("a:2", 2080)], True),
        ([worker("a:1", 2080), worker("a:2", 2079)], False),
    ],
)
def test_a_mesh_beside_another_needs_memory_that_is_free_now(workers: list[WorkerReport], fits: bool) -> None:
    placement = Placement(tuple(one.address for one in workers), ())
    if fits:
        check_beside(PLAN, placement, workers, num_pages=2)
    else:
        with pytest.raises(OutOfMemory, match="GiB free beside what it holds now, and its part of 2 shards takes"):
            check_beside(PLAN, placement, workers, num_pages=2)


def test_a_shard_that_is_held_already_needs_room_for_its_kv_only() -> None:
    held = Held(state=WORKER_STATE_LOADED, plan_digest=b"p" * 32, shard=0)
    workers = [
        WorkerReport("a:1", DescribeResponse(memory_free_bytes=160, held=held, weights_bytes=1000)),
        worker("b:1", 920),
    ]
    check_beside(PLAN, Placement(("a:1", "b:1"), ()), workers, num_pages=2)
