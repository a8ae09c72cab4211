"""Workers that die while nobody asks for anything, while they load, and all at once."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.faults.injury import injure
from tests.faults.mesh import Mesh, Worker
from tests.faults.proxy import Moment, When
from tests.faults.streams import ALL_STREAMS, GREEDY_STREAM, Caller, Outcome, differences
from tests.faults.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="package")

NOTICED_S = 10.0
"""A broken stream is noticed at once, on a busy core a little later; the next sign of life would come after 15 s."""


async def _is_whole_without(mesh: Mesh, caller: Caller, worker: Worker) -> bool:
    serving = await mesh.serving(caller)
    return len(serving) == 2 and worker not in serving


async def test_a_worker_that_dies_while_idle_is_replaced_before_the_next_request(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome]
) -> None:
    worker = (await mesh.serving(served))[1]
    worker.kill()
    await wait_until("a mesh without the dead worker", lambda: _is_whole_without(mesh, served, worker), NOTICED_S)
    epoch = (await served.mesh()).epoch
    outcome = await served.generate(GREEDY_STREAM)
    assert not differences(GREEDY_STREAM, outcome, expected["greedy"])
    assert (await served.mesh()).epoch == epoch, "the request had to wait for a mesh"


async def test_a_spare_that_dies_while_it_loads_is_passed_over(mesh: Mesh, served: Caller, expected: dict[str, Outcome]) -> None:
    serving = await mesh.serving(served)
    (spare,) = (worker for worker in mesh.workers if worker not in serving)
    restarts: list[asyncio.Task[None]] = []

    def kill_spare() -> None:
        spare.kill()
        serving[1].start()
        restarts.append(asyncio.create_task(serving[1].wait_listening()))

    def kill(_: object) -> None:
        serving[1].kill()
        # The spare may hold the plan from before.
        spare.program.kill()
        spare.start()
        restarts.append(asyncio.create_task(spare.wait_listening()))
        spare.proxy.on_load = kill_spare

    await injure(mesh, served, expected, serving[1], Moment(11, "attend", 1), act=kill)
    await asyncio.gather(*restarts)
    assert not spare.program.alive, "the spare was never asked to load"
    assert await mesh.serving(served) == serving


async def test_all_workers_that_die_at_once_are_waited_for(mesh: Mesh, served: Caller, expected: dict[str, Outcome]) -> None:
    worker = (await mesh.serving(served))[0]
    restarts: list[asyncio.Task[None]] = []

    def kill_all(_: object) -> None:
        for one in mesh.workers:
            one.kill()
            one.start()
            restarts.append(asyncio.create_task(one.wait_listening()))

    await injure(mesh, served, expected, worker, Moment(14, "feed_forward", 2, When.WITHIN), act=kill_all)
    await asyncio.gather(*restarts)


async def test_a_worker_that_dies_while_the_coordinator_starts_is_replaced_by_a_spare(
    mesh: Mesh, expected: dict[str, Outcome]
) -> None:
    for worker in mesh.workers:
        await worker.release()

    def kill_first(worker: Worker) -> None:
        for one in mesh.workers:
            one.proxy.on_load = None
        worker.kill()

    for worker in mesh.workers:
        worker.proxy.on_load = partial(kill_first, worker)
    try:
        async with mesh.coordinator() as (_, caller):
            outcomes = await caller.generate_all()
            assert sum(worker.program.alive for worker in mesh.workers) == 2
    finally:
        await mesh.mend()
    assert not [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]
