"""Workers that hang and networks that break, stall or are slow: noticed by a deadline, and no stream shows it."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.injury import injure
from tests.faults.mesh import MAX_ROWS, ROUND_TIMEOUT_S, Mesh, Worker
from tests.faults.proxy import Moment, When
from tests.faults.streams import ALL_STREAMS, Caller, Outcome, differences
from tests.faults.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="package")

NOTICED_S = ROUND_TIMEOUT_S * (1 + MAX_ROWS / 40)
"""A round of that many rows may take so long."""
SLACK_S = 15.0
"""For everything else, on a busy core."""


async def _idle(worker: Worker) -> bool:
    described = await worker.describe()
    return (described.num_sessions, described.kv_bytes) == (0, 0)


@pytest.mark.parametrize(("shard", "moment"), [(1, Moment(9, "attend", 2, When.WITHIN))], ids=str)
async def test_a_frozen_worker_is_noticed_and_adds_nothing_when_it_wakes(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], shard: int, moment: Moment
) -> None:
    worker = (await mesh.serving(served))[shard]
    outcomes = await injure(mesh, served, expected, worker, moment, act=lambda _: worker.freeze())
    assert NOTICED_S / 2 < max(outcome.longest_pause_s for outcome in outcomes.values()) < NOTICED_S + SLACK_S
    assert worker not in await mesh.serving(served), "a worker that hung is avoided while others suffice"
    epoch = (await served.mesh()).epoch
    # It wakes in the middle of other work, with the answer of an old epoch on its lips.
    running = asyncio.create_task(served.generate_all())
    await asyncio.sleep(0)
    worker.thaw()
    outcomes = await running
    assert not [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]
    await wait_until("the worker to drop its old session and KV", lambda: _idle(worker), SLACK_S)
    assert (await served.mesh()).epoch == epoch


@pytest.mark.parametrize(("shard", "moment"), [(0, Moment(21, "feed_forward", 0, When.AFTER))], ids=str)
async def test_a_cable_that_was_pulled_out_is_noticed(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], shard: int, moment: Moment
) -> None:
    worker = (await mesh.serving(served))[shard]
    outcomes = await injure(mesh, served, expected, worker, moment, act=lambda _: worker.link.hold())
    assert max(outcome.longest_pause_s for outcome in outcomes.values()) < NOTICED_S + SLACK_S
    assert worker not in await mesh.serving(served)
    worker.link.release()
    await wait_until("the worker to drop its old session and KV", lambda: _idle(worker), SLACK_S)


@pytest.mark.parametrize(("shard", "moment"), [(0, Moment(5, "attend", 1, When.AFTER))], ids=str)
async def test_a_connection_that_is_reset_costs_no_weights(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], shard: int, moment: Moment
) -> None:
    serving = await mesh.serving(served)
    before = await served.mesh()
    loaded = [worker.program.printed().count("plan loaded") for worker in serving]
    await injure(mesh, served, expected, serving[shard], moment, act=lambda _: serving[shard].link.reset())
    after = await served.mesh()
    assert after.epoch > before.epoch
    assert [worker.program.printed().count("plan loaded") for worker in serving] == loaded


async def test_a_slow_network_is_no_failure(mesh: Mesh, served: Caller, expected: dict[str, Outcome]) -> None:
    worker = (await mesh.serving(served))[1]
    epoch = (await served.mesh()).epoch

    def slow(_: object) -> None:
        worker.link.delay_s = 0.005

    await injure(mesh, served, expected, worker, Moment(10), act=slow)
    assert (await served.mesh()).epoch == epoch
