"""Workers behind a switch of our own, in network namespaces, that stops forwarding: nobody is told, nothing is reset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.namespaces import Network, missing
from tests.faults.mesh import ROUND_TIMEOUT_S, Coordinator
from tests.faults.programs import Programs
from tests.faults.streams import ALL_STREAMS, Caller, Outcome, differences
from tests.faults.waiting import wait_until, within

pytestmark = [
    pytest.mark.asyncio(loop_scope="package"),
    pytest.mark.skipif(missing() is not None, reason=missing() or "network namespaces work"),
]

PORT = 7001
NUM_WORKERS = 3
HEALED_S = 90.0
"""TCP tries again after up to that long."""


@asynccontextmanager
async def _network(model: Path, directory: Path) -> AsyncIterator[tuple[Network, Caller]]:
    """Node 0 has the coordinator, and each other node a worker."""
    with Network(1 + NUM_WORKERS) as network, Programs(directory) as programs:
        workers, addresses = [], []
        for node in range(1, 1 + NUM_WORKERS):
            addresses.append(f"{network.address(node)}:{PORT}")
            arguments = ("shardworker", "serve", "--listen", addresses[-1], "--threads", "1", "--insecure")
            workers.append(programs.start(f"worker-{node}", *arguments, inside=network.inside(node, ())))
        for worker in workers:
            await worker.wait_printed("listening on")
        coordinator = Coordinator(programs, "c", model, addresses=addresses, flags={}, inside=network.inside(0, ()))
        async with Caller(coordinator.address) as caller:
            await coordinator.wait_serving(caller)
            yield network, caller


@pytest.mark.parametrize("tokens", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.slow)])
async def test_a_worker_that_is_cut_off_is_replaced_and_comes_back_as_a_spare(
    model: Path, short_path: Path, expected: dict[str, Outcome], tokens: int
) -> None:
    async with _network(model, short_path) as (network, caller):
        before = await caller.mesh()
        node, address = next(
            (number, worker.address) for number, worker in enumerate(before.workers, 1) if worker.serving and worker.shard == 1
        )
        cut = asyncio.Event()

        def cut_at(outcome: Outcome) -> None:
            if len(outcome.tokens) == tokens and not cut.is_set():
                network.cut(node)
                cut.set()

        outcomes = await within(90, "all streams to end", caller.generate_all(on_message=cut_at))
        wrong = [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]
        assert not wrong
        assert cut.is_set()
        pause_s = max(outcome.longest_pause_s for outcome in outcomes.values())
        assert pause_s > ROUND_TIMEOUT_S, "the cut was not felt"
        after = await caller.mesh()
        assert address not in {worker.address for worker in after.workers if worker.serving}
        assert after.epoch > before.epoch
        network.mend(node)

        async def spare_again() -> bool:
            (worker,) = (one for one in (await caller.mesh()).workers if one.address == address)
            return worker.reachable and worker.kv_bytes == 0

        await wait_until("the worker to be a spare without sessions", spare_again, HEALED_S)
