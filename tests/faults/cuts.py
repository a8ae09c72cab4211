"""The mesh is cut anew while streams run: what every test of resharding does, and what must be true afterwards."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.faults.streams import ALL_STREAMS, STREAM_S, Caller, Outcome, differences
from tests.faults.waiting import wait_until, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from protos.generation_pb2 import GetMeshResponse
    from protos.shardworker_pb2 import DescribeResponse
    from tests.faults.mesh import Mesh

WIDE_WORKERS = 5
"""Four shards and a spare."""
CUT_S = 60.0
"""Longest until a mesh that was asked for serves, whatever fails meanwhile."""
TIDY_S = 20.0
"""Longest until nobody holds what nobody uses: sessions end when a worker wakes or its connection is known to be gone."""


async def wait_cut(caller: Caller, num_shards: int) -> GetMeshResponse:
    """Wait until a mesh of so many shards serves, and no other is wanted."""

    async def found() -> GetMeshResponse | None:
        mesh = await caller.mesh()
        return mesh if mesh.serving and mesh.num_shards == mesh.wanted_shards == num_shards else None

    mesh: GetMeshResponse = await wait_until(f"{num_shards} shards to serve", found, CUT_S)
    return mesh


async def cut(caller: Caller, num_shards: int) -> None:
    """Ask for so many shards, and wait until they serve."""
    await caller.reshard(num_shards)
    await wait_cut(caller, num_shards)


async def under_streams(caller: Caller, expected: dict[str, Outcome], work: Callable[[], Awaitable[object]]) -> list[Outcome]:
    """Run all streams, each again and again, from before some work until after it, and check that none shows it.

    Raises:
        AssertionError: a token is lost, doubled or changed, or a stream did not end right.

    """
    done, busy = asyncio.Event(), {stream.name: asyncio.Event() for stream in ALL_STREAMS}
    outcomes: list[tuple[str, Outcome]] = []
    wrong: list[str] = []

    async def keep_running(number: int) -> None:
        stream = ALL_STREAMS[number]

        def note(outcome: Outcome) -> None:
            if outcome.tokens:
                busy[stream.name].set()

        while not done.is_set() and not wrong:
            outcome = await caller.generate(stream, note)
            outcomes.append((stream.name, outcome))
            wrong.extend(differences(stream, outcome, expected[stream.name]))

    async def act() -> None:
        try:
            for name, event in busy.items():
                await within(STREAM_S, f"a token of {name}", event.wait())
            await work()
        finally:
            done.set()

    async with asyncio.TaskGroup() as group:
        for number in range(len(ALL_STREAMS)):
            group.create_task(keep_running(number))
        group.create_task(act())
    assert not wrong, "\n".join(wrong)
    return [outcome for _, outcome in outcomes]


async def check_tidy(mesh: Mesh, caller: Caller) -> None:
    """Check that soon each serving worker holds its shard and nothing else, and each other one no more than the last it held."""
    untidy: list[str] = []

    async def is_tidy() -> bool:
        found, serving = await caller.mesh(), await mesh.serving(caller)
        untidy[:] = [
            f"worker {worker.number}: {text}"
            for worker in mesh.workers
            if (text := _untidy(await worker.describe(), serving.index(worker) if worker in serving else None, found))
        ]
        return not untidy

    try:
        await wait_until("workers to hold what they need and nothing else", is_tidy, TIDY_S)
    except AssertionError as error:
        raise AssertionError("; ".join([str(error), *untidy])) from None


def _untidy(described: DescribeResponse, shard: int | None, mesh: GetMeshResponse) -> str:
    """Say what a worker has that it need not have, or the other way round; empty if nothing."""
    held = described.held
    found = (described.num_sessions, len(held.former), held.plan_digest.hex()[:8], held.shard)
    wanted = (1, 0, mesh.plan_digest.hex()[:8], shard)
    if shard is None:
        found, wanted = (described.num_sessions, len(held.former), described.kv_bytes), (0, 0, 0)
    return "" if found == wanted else f"{found} instead of {wanted}"
