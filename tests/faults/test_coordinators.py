"""The coordinator is killed, or drains, alone on its workers or beside another one."""

from __future__ import annotations

import asyncio
import signal

import grpc
import pytest

from tests.faults.campaign import prepared, sampled_moments
from tests.faults.mesh import Mesh, Worker
from tests.faults.programs import Program
from tests.faults.proxy import Moment
from tests.faults.streams import (
    ALL_STREAMS,
    GREEDY_STREAM,
    SEEDED_STREAM,
    Caller,
    Outcome,
    Stream,
    broken_differences,
    differences,
)
from tests.faults.waiting import wait_until, within

pytestmark = pytest.mark.asyncio(loop_scope="package")

ENDLESS = Stream("endless", GREEDY_STREAM.prompt, max_tokens=480)
END_S = 20.0


async def _serve_only(mesh: Mesh, serving: list[Worker]) -> bool:
    """Whether the workers have one session each, and the others none."""
    described = {worker: await worker.describe() for worker in mesh.workers}
    kv_bytes = {one.kv_bytes for worker, one in described.items() if worker in serving}
    idle = [(one.num_sessions, one.kv_bytes) for worker, one in described.items() if worker not in serving]
    return all(described[worker].num_sessions == 1 for worker in serving) and len(kv_bytes) == 1 and set(idle) <= {(0, 0)}


def _wrong(outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> list[str]:
    return [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]


@pytest.mark.parametrize("moment", sampled_moments(2, seed=3), ids=str)
async def test_a_killed_coordinator_leaves_workers_that_serve_the_next(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], moment: Moment
) -> None:
    """Beside `served`, which has sessions on the same workers."""
    serving = await mesh.serving(served)
    async with mesh.coordinator() as (coordinator, caller):
        worker = (await mesh.serving(caller))[0]
        loads = [one.program.printed().count("plan loaded") for one in mesh.workers]
        sprung = prepared(mesh, worker, moment, lambda _: coordinator.program.kill())
        outcomes = await within(END_S, "streams of a killed coordinator to end", caller.generate_all())
        assert sprung.is_set()
    gone = (grpc.StatusCode.UNAVAILABLE,)
    assert not [
        text for stream in ALL_STREAMS for text in broken_differences(stream, outcomes[stream.name], expected[stream.name], gone)
    ]
    assert any(outcome.code is grpc.StatusCode.UNAVAILABLE for outcome in outcomes.values())
    await wait_until("the workers to drop what the dead coordinator had", lambda: _serve_only(mesh, serving), END_S)
    async with mesh.coordinator() as (_, caller):
        assert not _wrong(await caller.generate_all(), expected)
    assert [one.program.printed().count("plan loaded") for one in mesh.workers] == loads, "weights were read again"


async def test_a_drain_lets_streams_finish_and_refuses_new_ones(mesh: Mesh, expected: dict[str, Outcome]) -> None:
    async with mesh.coordinator(grace=END_S) as (coordinator, caller), Caller(coordinator.address) as other:
        started = asyncio.Event()

        def note(outcome: Outcome) -> None:
            if outcome.tokens:
                started.set()

        running = [asyncio.create_task(caller.generate(stream, note)) for stream in (ENDLESS, SEEDED_STREAM)]
        await within(END_S, "a first token", started.wait())
        coordinator.program.send(signal.SIGTERM)

        async def draining() -> bool:
            return not await caller.serving()

        await wait_until("NOT_SERVING after SIGTERM", draining, 2.0)
        # On a channel that was open before, and on a new one.
        for asking in (caller, other):
            refused = await asking.generate(GREEDY_STREAM)
            assert (refused.code, refused.error_reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING"), refused
            assert refused.retry_s is not None
        endless, seeded = await asyncio.gather(*running)
        assert not differences(SEEDED_STREAM, seeded, expected["seeded"])
        assert (endless.code, len(endless.tokens), endless.usage) == (grpc.StatusCode.OK, 480, (5, 480))
        assert endless.tokens[:32] == expected["greedy"].tokens
        assert await coordinator.program.wait_ended(END_S) == 0


async def test_what_a_drain_cannot_finish_ends_with_one_status(mesh: Mesh) -> None:
    async with mesh.coordinator(grace=0.3) as (coordinator, caller):
        running = asyncio.create_task(caller.generate(ENDLESS, lambda outcome: _terminate_at(outcome, coordinator.program, 5)))
        outcome = await running
        assert (outcome.code, outcome.error_reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
        assert outcome.retry_s is not None
        assert 5 <= len(outcome.tokens) < 480
        assert outcome.disorder == []
        assert await coordinator.program.wait_ended(END_S) == 0


async def test_a_second_sigterm_ends_it_now(mesh: Mesh) -> None:
    async with mesh.coordinator(grace=600) as (coordinator, caller):
        running = asyncio.create_task(caller.generate(ENDLESS, lambda outcome: _terminate_at(outcome, coordinator.program, 3)))

        async def draining() -> bool:
            return not await caller.serving()

        await wait_until("NOT_SERVING after SIGTERM", draining, END_S)
        assert coordinator.program.alive
        coordinator.program.send(signal.SIGTERM)
        assert await coordinator.program.wait_ended(5.0) == 128 + signal.SIGTERM
        assert (await running).code is grpc.StatusCode.UNAVAILABLE


def _terminate_at(outcome: Outcome, program: Program, tokens: int) -> None:
    if len(outcome.tokens) == tokens:
        program.send(signal.SIGTERM)


async def test_one_of_two_coordinators_is_killed_under_load_and_the_other_does_not_see_it(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome]
) -> None:
    epoch = (await served.mesh()).epoch
    async with mesh.coordinator() as (second, caller):
        both = [asyncio.create_task(one.generate_all()) for one in (served, caller, served)]

        async def busy() -> bool:
            return all([(await one.mesh()).load.running >= 3 for one in (served, caller)])

        await wait_until("both coordinators to be at work", busy, END_S)
        second.program.kill()
        mine, other, mine_too = await within(END_S * 3, "all streams to end", asyncio.gather(*both))
    assert _wrong(mine, expected) == _wrong(mine_too, expected) == []
    assert {outcome.code for outcome in other.values()} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK}
    assert (await served.mesh()).epoch == epoch, "the other coordinator's mesh broke"
