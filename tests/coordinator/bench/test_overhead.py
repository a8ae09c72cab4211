"""The echo beside the mesh: what it is asked for, that it obeys, and how both are compared."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.bench.echo import Order, obey, spun_ns
from coordinator.bench.overhead import OverheadComparison, compare_overheads, echo_servers, token_orders
from coordinator.bench.statistics import Spread
from protos.errors import MeshError
from tests.coordinator.bench.rounds import MS, make_round, make_steps


@pytest.fixture
def folder() -> Iterator[Path]:
    """Sockets need a short path, which tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="shardmesh-test-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(("request_bytes", "reply_bytes"), [(100, 70), (12, 8), (4096, 100_000)])
def test_echo_takes_and_gives_the_bytes_it_is_told(request_bytes: int, reply_bytes: int) -> None:
    request = Order(request_bytes, reply_bytes, 0).encode()
    assert (len(request), len(obey(request))) == (request_bytes, reply_bytes)


def test_sizes_below_a_header_become_a_headers() -> None:
    request = Order(1, 1, 0).encode()
    assert (len(request), len(obey(request))) == (12, 8)


def test_echo_spins_as_long_as_it_is_told_and_says_how_long() -> None:
    assert MS <= spun_ns(obey(Order(20, 20, MS).encode())) < 1000 * MS


def test_orders_of_a_token_are_medians_in_the_order_of_its_rounds() -> None:
    rounds = [
        make_round(action, step=step, layer=layer, compute_ms=(step, step + 2))
        for step in (1, 2, 6)
        for action, layer in (("attend", 0), ("feed_forward", 0), ("attend", 1), ("feed_forward", 1), ("head", None))
    ]
    orders = token_orders(rounds)
    assert [action for action, _ in orders] == ["attend", "feed_forward", "attend", "feed_forward", "head"]
    # Computes are 1, 3, 2, 4, 6 and 8 ms; answers 50 and 60 bytes.
    assert {order for _, order in orders} == {Order(100, 55, round(3.5 * MS))}


def test_overheads_are_compared_by_action_and_in_all() -> None:
    everything, pairs = compare_overheads(
        {"attend": [200, 300, 400], "head": [100], "unknown": [9e9]}, {"head": [50], "attend": [100, 200]}
    )
    assert list(pairs) == ["attend", "head"]
    assert pairs["attend"] == OverheadComparison(Spread(200, 300, 400), Spread(100, 150, 200))
    assert pairs["attend"].ratio == 2
    assert everything.as_dict() == {
        "overhead_us": {"min": 100, "median": 250, "max": 400},
        "echo_overhead_us": {"min": 50, "median": 100, "max": 200},
        "ratio": 2.5,
    }


def test_without_an_echo_there_is_no_ratio() -> None:
    everything, pairs = compare_overheads({"attend": [200, 300, 400], "head": [100]}, {})
    assert everything == OverheadComparison(Spread(100, 250, 400), None)
    assert list(pairs) == ["attend", "head"]
    assert pairs["attend"].as_dict() == {
        "overhead_us": {"min": 200, "median": 300, "max": 400},
        "echo_overhead_us": None,
        "ratio": None,
    }


async def test_echo_servers_answer_all_rounds_of_whole_tokens(folder: Path) -> None:
    orders = token_orders(make_steps([1, 1]))
    async with echo_servers(folder, 2) as echo:
        orders = [(action, order._replace(spin_ns=MS // 100)) for action, order in orders]
        found = await echo.measure(orders)
        again = await echo.measure(orders[:1])
    assert list(found) == ["attend", "feed_forward", "head"]
    assert {len(values) for values in found.values()} == {66}
    assert len(again["attend"]) == 200
    assert all(value > 0 for values in found.values() for value in values)


async def test_a_server_that_cannot_listen_is_an_error_that_says_why(folder: Path) -> None:
    with pytest.raises(MeshError, match=r"an echo server ended with exit code 1: .*no folder"):
        async with echo_servers(folder / "missing", 1):
            pass


async def test_nothing_outlives_a_cancelled_benchmark(folder: Path) -> None:
    ready = asyncio.Event()

    async def work() -> None:
        async with echo_servers(folder, 1) as echo:
            ready.set()
            while True:
                await echo.measure([("attend", Order(20, 20, MS // 100))])

    task = asyncio.create_task(work())
    await ready.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
