"""Starts that meet: two coordinators on the same empty workers, and a coordinator before its workers."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.app import Coordinator
from coordinator.config import DiscoverySettings, ModelSettings, ServeSettings
from shardworker.app import start_worker
from tests.mesh.conftest import Mesh, start_coordinator

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


@pytest.mark.parametrize("weights", ["shared", "stream"])
async def test_both_serve_and_both_recover(checkpoint: Path, tmp_path: Path, weights: str) -> None:
    addresses = [f"unix:{tmp_path}/w{number}" for number in range(3)]

    async def start(number: int, workers: list[str]) -> Coordinator:
        return await start_coordinator(
            ServeSettings(
                model=ModelSettings(str(checkpoint), dtype="f32", wire="f32"),
                listen=f"unix:{tmp_path}/c{number}",
                workers=tuple(workers),
                shards=2,
                weights=weights,
                discovery=DiscoverySettings(startup_s=30.0),
            )
        )

    async with AsyncExitStack() as stack:
        workers = [await start_worker(address, device="cpu", threads=1) for address in addresses]
        for worker in workers:
            stack.push_async_callback(worker.stop, 0)
        # Each would place its shards elsewhere.
        both = await asyncio.gather(start(1, addresses), start(2, [*addresses[1:], addresses[0]]))
        for coordinator in both:
            stack.push_async_callback(coordinator.stop, 0)
        meshes = [await stack.enter_async_context(Mesh.connect(coordinator, workers)) for coordinator in both]
        expected = (await meshes[0].generate(PROMPT, 40)).tokens
        streams = [asyncio.create_task(mesh.generate(PROMPT, 40)) for mesh in meshes for _ in range(2)]
        await asyncio.sleep(0)
        await workers[1].stop(0)
        async with asyncio.timeout(60):
            assert [(await stream).tokens for stream in streams] == [expected] * 4


async def test_a_mesh_is_as_large_as_the_list_of_workers_allows_whoever_starts_first(checkpoint: Path, tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/w{number}" for number in range(2)]
    first = await start_worker(addresses[0], device="cpu", threads=1)
    starting = asyncio.create_task(
        start_coordinator(
            ServeSettings(
                model=ModelSettings(str(checkpoint), dtype="f32", wire="f32"),
                listen=f"unix:{tmp_path}/c",
                workers=tuple(addresses),
                discovery=DiscoverySettings(startup_s=30.0),
            )
        )
    )
    # The coordinator waits: one worker alone could hold this model.
    done, _ = await asyncio.wait([starting], timeout=1.0)
    assert not done
    second = await start_worker(addresses[1], device="cpu", threads=1)
    coordinator = await starting
    try:
        async with Mesh.connect(coordinator, [first, second]) as mesh:
            assert (await mesh.client.mesh()).num_shards == 2
    finally:
        await coordinator.stop(0)
        await first.stop(0)
        await second.stop(0)
