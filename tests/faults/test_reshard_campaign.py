"""Resharding under kill -9: of one that serves, of one that loads, of both, at each stage, from and to several numbers of shards.

And what ten changes there and back leave in workers' memory; and weights that the coordinator sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.faults.cuts import CUT_S, check_tidy, cut, under_streams, wait_cut
from tests.faults.mesh import Mesh, Worker
from tests.faults.proxy import Stage
from tests.faults.streams import Caller, Outcome
from tests.faults.waiting import within

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.slow]

CHANGES = 10
GROWTH = 0.02
"""Of a worker's resident set, from the second time that it held all there is to the last, at most."""


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def caller(wide: Mesh, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """Of a coordinator whose workers read the files, or are sent them."""
    async with wide.coordinator(weights=request.param) as (_, running):
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def undisturbed(caller: Caller) -> dict[str, Outcome]:
    return await caller.generate_all()


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize(
    ("caller", "change", "victims"),
    [
        *(("shared", (2, 4), victims) for victims in ("serving", "loading", "both")),
        ("shared", (4, 2), "both"),
        ("stream", (2, 4), "both"),
    ],
    indirect=["caller"],
    ids=str,
)
async def test_workers_are_killed_in_the_middle_and_come_back(  # noqa: PLR0917  # fixtures and parameters
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome], victims: str, stage: Stage, change: tuple[int, int]
) -> None:
    before, after = change
    await cut(caller, before)
    serving = await wide.serving(caller)
    spares = [worker for worker in wide.workers if worker not in serving]
    for spare in spares:
        await spare.release()
    sprung, restarts = asyncio.Event(), []

    def act(loading: Worker) -> None:
        for one in spares:
            one.proxy.at_stage.clear()
        for victim in {"serving": [serving[-1]], "loading": [loading], "both": [serving[-1], loading]}[victims]:
            victim.kill()
            victim.start()
            restarts.append(asyncio.create_task(victim.wait_listening()))
        sprung.set()

    def trap(worker: Worker) -> Any:
        return lambda _: act(worker)

    for spare in spares:
        spare.proxy.at_stage[stage] = trap(spare)
    await under_streams(caller, undisturbed, lambda: cut(caller, after))
    await within(CUT_S, "killed workers to listen again", asyncio.gather(*restarts))
    assert sprung.is_set()
    await wide.mend(caller)
    await wait_cut(caller, after)
    await check_tidy(wide, caller)


@pytest.mark.parametrize("caller", ["shared", "stream"], indirect=True)
async def test_ten_changes_there_and_back_leave_nothing_in_memory(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]
) -> None:
    sizes: list[list[int]] = []

    async def work() -> None:
        for _ in range(CHANGES + 2):
            for num_shards in (4, 2):
                await cut(caller, num_shards)
                await check_tidy(wide, caller)
            sizes.append([worker.program.rss_bytes for worker in wide.workers])

    await under_streams(caller, undisturbed, work)
    print([[round(size / 2**20, 1) for size in row] for row in sizes])  # noqa: T201  # the figures
    growths = [last / settled - 1 for settled, last in zip(sizes[1], sizes[-1], strict=True)]
    assert max(growths) < GROWTH, growths
