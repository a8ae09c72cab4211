"""The number of shards changes while streams run: the same tokens, whatever happens in the middle of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import resharding
from coordinator.planning import capacity
from protos import generation_pb2
from protos.errors import OutOfMemory, TopologyError
from shardworker import loading
from tests.mesh.conftest import Mesh, MeshMaker

PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11] * 40)
NUM_TOKENS = 120
SEEDED = {"sampling": {"temperature": 0.8, "seed": 3}}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("glm4_moe")


async def until(running: Mesh, true: Callable[[generation_pb2.GetMeshResponse], bool]) -> generation_pb2.GetMeshResponse:
    async with asyncio.timeout(30):
        while not true(found := await running.client.mesh()):  # noqa: ASYNC110  # a caller can only ask
            await asyncio.sleep(0.01)
        return found


async def ask(running: Mesh, num_shards: int) -> None:
    await running.client.reshard(num_shards)


async def streams(running: Mesh) -> list[list[int]]:
    """Greedy and seeded, together."""
    greedy = [running.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]
    seeded = [running.generate(prompt, NUM_TOKENS, **SEEDED) for prompt in PROMPTS]
    return [completed.tokens for completed in await asyncio.gather(*greedy, *seeded)]


def serves(num_shards: int) -> Callable[[generation_pb2.GetMeshResponse], bool]:
    return lambda found: found.serving and found.num_shards == num_shards == found.wanted_shards


@pytest.mark.parametrize(
    ("model", "before", "after", "spares"),
    [("glm4_moe", 2, 4, 2), ("glm4_moe", 4, 2, 0), ("llama_odd", 1, 2, 1), ("llama_odd", 2, 3, 1)],
)
async def test_running_streams_go_on_with_the_same_tokens(  # noqa: PLR0917  # fixtures and parameters
    checkpoint_of: Callable[[str], Path], mesh: MeshMaker, model: str, before: int, after: int, spares: int
) -> None:
    async with mesh(checkpoint_of(model), before, spares=spares) as running:
        expected = await streams(running)
        under_way = asyncio.create_task(streams(running))
        steps = (await running.client.mesh()).load.steps
        await until(running, lambda found: found.load.running == 6 and found.load.steps > steps + 10)
        await ask(running, after)
        found = await until(running, serves(after))
        assert found.load.running == 6, "the streams ended before the mesh changed"
        assert await under_way == expected
        assert await streams(running) == expected
        assert (found.recovery.reshards, found.recovery.recoveries, dict(found.recovery.failures)) == (1, 0, {})
        serving = [worker for worker in found.workers if worker.serving]
        assert sorted(worker.shard for worker in serving) == list(range(after))
        assert (await running.client.mesh()).recovery.last_replay_ns > 0 == found.recovery.last_assemble_ns
        # Nobody keeps what nobody uses.
        assert not any(worker._holding.held().former for worker in running.workers)


async def test_there_and_back_again_and_again(checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "SWEEP_S", 0.1)
    async with mesh(checkpoint, 1, spares=3) as running:
        expected = await streams(running)
        for num_shards in (4, 2, 3, 1, 4, 2):
            under_way = asyncio.create_task(streams(running))
            await until(running, lambda found: found.load.running > 0)
            await ask(running, num_shards)
            assert await under_way == expected
            await until(running, serves(num_shards))
        assert (await running.client.mesh()).recovery.reshards == 6
        # Nothing is left on those that serve no more.
        await until(running, lambda found: sum(worker.weights_bytes > 0 for worker in found.workers) == 2)
        assert (await running.client.mesh()).recovery.recoveries == 0


async def test_where_both_do_not_fit_the_mesh_gives_way_and_streams_wait(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutOfMemory("no room beside what is held now")

    async with mesh(checkpoint, 2, spares=2) as running:
        expected = await streams(running)
        monkeypatch.setattr("coordinator.workers.pool.check_beside", refuse)
        under_way = asyncio.create_task(streams(running))
        await until(running, lambda found: found.load.running == 6)
        await ask(running, 4)
        assert await under_way == expected
        found = await until(running, serves(4))
        assert found.recovery.reshards == 1
        # They waited for the load.
        assert found.recovery.last_assemble_ns > 0 < found.recovery.last_canary_ns


async def test_a_worker_that_dies_while_the_next_mesh_loads_costs_no_token(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_weights, entered, gate = loading.load_weights, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any, **others: Any) -> Any:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(20)
        return load_weights(*arguments, **others)

    async with mesh(checkpoint, 2, spares=3) as running:
        expected = await streams(running)
        monkeypatch.setattr(loading, "load_weights", slow)
        under_way = asyncio.create_task(streams(running))
        await until(running, lambda found: found.load.running == 6)
        await ask(running, 4)
        await asyncio.wait_for(entered.wait(), 10)
        await running.workers[1].stop(0)
        gate.set()
        assert await under_way == expected
        found = await until(running, serves(4))
        assert found.recovery.reshards == 1


async def test_a_number_that_cannot_be_is_refused_and_nothing_changes(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1, spares=1) as running:
        with pytest.raises(TopologyError, match="3 shards need 3 workers, 2 are listed"):
            await ask(running, 3)
        found = await running.client.mesh()
        assert (found.serving, found.num_shards, found.wanted_shards, found.reshard_obstacle) == (True, 1, 1, "")


async def test_what_is_in_the_way_is_told_and_the_present_mesh_serves(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 1, spares=2) as running:
        expected = await streams(running)
        await running.workers[2].stop(0)
        await running.workers[1].stop(0)
        await ask(running, 2)
        found = await until(running, lambda found: bool(found.reshard_obstacle))
        assert (found.serving, found.num_shards, found.wanted_shards) == (True, 1, 2)
        assert await streams(running) == expected
        await ask(running, 1)
        found = await running.client.mesh()
        assert (found.wanted_shards, found.reshard_obstacle, found.recovery.reshards) == (1, "", 0)


async def test_too_little_memory_for_the_kv_cache_is_in_the_way(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mesh(checkpoint, 1, spares=1, kv_tokens=256) as running:
        expected = await streams(running)
        monkeypatch.setattr(capacity, "_smallest_memory", lambda _: 0)
        under_way = asyncio.create_task(streams(running))
        await until(running, lambda found: found.load.running > 0)
        await ask(running, 2)
        # It gives way, to see whether that is enough, and comes back.
        found = await until(running, lambda found: found.serving and bool(found.reshard_obstacle))
        assert "lower --kv-tokens" in found.reshard_obstacle
        assert (found.num_shards, found.recovery.reshards) == (1, 0)
        assert await under_way == expected
