"""The mesh is cut anew while streams run, and things break in the middle: no stream shows it, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tests.faults.cuts import CUT_S, check_tidy, cut, under_streams, wait_cut
from tests.faults.mesh import Mesh, Worker, mesh_of
from tests.faults.programs import ROOT
from tests.faults.proxy import Stage
from tests.faults.streams import ALL_STREAMS, GREEDY_STREAM, Caller, Outcome, Stream, broken_differences, differences
from tests.faults.waiting import wait_until, within

pytestmark = pytest.mark.asyncio(loop_scope="package")

RECOVERED_S = 4.0
"""Longest pause of a stream where a mesh can be had at once, on a busy core."""


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def wide_caller(wide: Mesh) -> AsyncIterator[Caller]:
    async with wide.coordinator("wide") as (_, caller):
        yield caller


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def alone(model: Path) -> AsyncIterator[Mesh]:
    """Workers of nobody yet: coordinators that share workers want the same number."""
    async with mesh_of(model, 4) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def undisturbed(wide_caller: Caller) -> dict[str, Outcome]:
    return await wide_caller.generate_all()


@pytest_asyncio.fixture(loop_scope="package")
async def caller(wide: Mesh, wide_caller: Caller, undisturbed: dict[str, Outcome]) -> AsyncIterator[Caller]:
    """On two shards and three spares that hold nothing; two again after the test, when nobody may hold what nobody uses."""
    del undisturbed
    for spare in await spares_of(wide, wide_caller):
        await spare.release()
    yield wide_caller
    await wide.mend(wide_caller)
    await cut(wide_caller, 2)
    await check_tidy(wide, wide_caller)


def at_once(workers: list[Worker], stage: Stage, act: Any) -> asyncio.Event:
    """Act on the first of some workers that gets so far; the event tells that it did."""
    sprung = asyncio.Event()

    def spring(worker: Worker, request: Any) -> None:
        for one in workers:
            one.proxy.at_stage.pop(stage, None)
        act(worker, request)
        sprung.set()

    for worker in workers:
        worker.proxy.at_stage[stage] = partial(spring, worker)
    return sprung


async def spares_of(mesh: Mesh, caller: Caller) -> list[Worker]:
    serving = await mesh.serving(caller)
    return [worker for worker in mesh.workers if worker not in serving]


def kill(worker: Worker, _: object = None) -> None:
    worker.kill()


async def test_any_number_follows_any_other(wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]) -> None:
    before = await caller.mesh()

    async def work() -> None:
        for num_shards in (3, 1, 4):
            await cut(caller, num_shards)
            await check_tidy(wide, caller)
        await by_command(wide, 2)

    await under_streams(caller, undisturbed, work)
    after = await wait_cut(caller, 2)
    assert after.recovery.reshards == before.recovery.reshards + 4
    assert (after.recovery.recoveries, after.epoch) == (before.recovery.recoveries, before.epoch + 4)


async def by_command(mesh: Mesh, num_shards: int) -> None:
    """`coordctl reshard`."""
    arguments = ("--coordinator", f"unix:{mesh.programs.directory / 'wide'}", "--shards", str(num_shards), "--insecure")
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "coordinator", "reshard", *arguments, cwd=ROOT, stdout=-1, stderr=-2
    )
    printed, _ = await within(CUT_S, "coordctl reshard", command.communicate())
    assert command.returncode == 0, printed
    assert f"served by {num_shards} shard" in printed.decode()


@pytest.mark.slow
async def test_one_that_loads_is_killed(wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]) -> None:
    before = await caller.mesh()
    sprung = at_once(await spares_of(wide, caller), Stage.LOADING, kill)
    await under_streams(caller, undisturbed, lambda: cut(caller, 4))
    assert sprung.is_set()
    after = await caller.mesh()
    assert after.recovery.recoveries == before.recovery.recoveries, "the mesh that served saw it"


async def test_one_that_serves_is_killed_while_another_loads(wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]) -> None:
    victim = (await wide.serving(caller))[1]
    sprung = at_once(await spares_of(wide, caller), Stage.LOADING, lambda *_: victim.kill())
    outcomes = await under_streams(caller, undisturbed, lambda: cut(caller, 4))
    assert sprung.is_set()
    assert victim not in await wide.serving(caller)
    assert max(outcome.longest_pause_s for outcome in outcomes) < RECOVERED_S


async def test_where_too_few_are_left_for_what_is_wanted_what_was_there_goes_on(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]
) -> None:
    victim = (await wide.serving(caller))[0]

    def kill_both(*workers: Worker) -> None:
        for worker in workers:
            worker.kill()
            # As from a machine that is gone; the proxy would answer at once, instead of it.
            worker.link.refuses = True
            worker.link.reset()

    async def work() -> None:
        await caller.reshard(4)
        await wait_until("both to be killed", lambda: not victim.program.alive, CUT_S)
        await wait_until("the mesh to serve again", partial(has_recovered, caller, before.epoch), CUT_S)
        assert (await caller.mesh()).num_shards == 2

    before = await caller.mesh()
    sprung = at_once(await spares_of(wide, caller), Stage.LOADED, lambda worker, _: kill_both(worker, victim))
    outcomes = await under_streams(caller, undisturbed, work)
    assert sprung.is_set()
    assert max(outcome.longest_pause_s for outcome in outcomes) < RECOVERED_S
    await wide.mend(caller)
    await under_streams(caller, undisturbed, lambda: wait_cut(caller, 4))


async def has_recovered(caller: Caller, epoch: int) -> bool:
    mesh = await caller.mesh()
    return mesh.serving and mesh.epoch > epoch


@pytest.mark.slow
async def test_one_that_hangs_while_it_loads_costs_no_stream_anything(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]
) -> None:
    before = await caller.mesh()
    sprung = at_once(await spares_of(wide, caller), Stage.LOADING, lambda worker, _: worker.freeze())

    async def work() -> None:
        await caller.reshard(4)
        await within(CUT_S, "a worker to be frozen", sprung.wait())
        await caller.generate_all()
        for worker in wide.workers:
            worker.thaw()
        await wait_cut(caller, 4)

    outcomes = await under_streams(caller, undisturbed, work)
    assert max(outcome.longest_pause_s for outcome in outcomes) < RECOVERED_S
    assert (await caller.mesh()).recovery.recoveries == before.recovery.recoveries


@pytest.mark.slow
async def test_a_load_that_fails_is_another_workers(wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]) -> None:
    failed: list[Worker] = []

    def lose_files(worker: Worker, request: Any) -> None:
        request.directory += "/gone"
        failed.append(worker)
        # For good.
        worker.proxy.at_stage[Stage.ASKED] = partial(lose_files, worker)

    at_once(await spares_of(wide, caller), Stage.ASKED, lose_files)
    await under_streams(caller, undisturbed, lambda: cut(caller, 4))
    assert failed
    assert failed[0] not in await wide.serving(caller)
    assert failed[0].program.alive


@pytest.mark.slow
async def test_files_that_are_gone_are_in_the_way_until_they_are_back(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]
) -> None:
    file = next(wide.model.glob("*.safetensors"))
    away = file.with_suffix(".away")

    async def work() -> None:
        file.rename(away)
        try:
            await caller.reshard(4)
            obstacle = await wait_until("what is in the way", lambda: obstacle_of(caller), CUT_S)
            assert file.name in obstacle
            mesh = await caller.mesh()
            assert (mesh.serving, mesh.num_shards, mesh.wanted_shards) == (True, 2, 4)
        finally:
            away.rename(file)
        await wait_cut(caller, 4)

    await under_streams(caller, undisturbed, work)


async def obstacle_of(caller: Caller) -> str:
    return (await caller.mesh()).reshard_obstacle


@pytest.mark.parametrize(
    ("wishes", "stage"),
    [
        pytest.param((4, 2), Stage.PROVING),
        pytest.param((4, 2), Stage.LOADING, marks=pytest.mark.slow),
        pytest.param((4, 3), Stage.LOADING, marks=pytest.mark.slow),
        pytest.param((4, 3), Stage.PROVING, marks=pytest.mark.slow),
        pytest.param((4, 2, 4), Stage.LOADING, marks=pytest.mark.slow),
        pytest.param((4, 2, 4), Stage.PROVING, marks=pytest.mark.slow),
    ],
    ids=str,
)
async def test_wishes_that_change_before_they_are_fulfilled(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome], wishes: tuple[int, ...], stage: Stage
) -> None:
    async def work() -> None:
        for num_shards in wishes[:-1]:
            sprung = at_once(await spares_of(wide, caller), stage, lambda *_: None)
            await caller.reshard(num_shards)
            if num_shards != 2:
                await within(CUT_S, f"a worker of {num_shards} to be {stage.value}", sprung.wait())
        await caller.reshard(wishes[-1])
        await wait_cut(caller, wishes[-1])
        await check_tidy(wide, caller)

    await under_streams(caller, undisturbed, work)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [Stage.LOADING, Stage.PROVING])
async def test_a_coordinator_that_is_killed_in_the_middle_leaves_workers_that_serve_another_number(
    alone: Mesh, undisturbed: dict[str, Outcome], stage: Stage
) -> None:
    async with alone.coordinator() as (coordinator, other):
        sprung = at_once(await spares_of(alone, other), stage, lambda *_: coordinator.program.kill())
        running = asyncio.create_task(other.generate_all())
        with contextlib.suppress(grpc.aio.AioRpcError):
            await other.reshard(4)
        outcomes = await within(CUT_S, "streams of a killed coordinator to end", running)
        assert sprung.is_set()
    gone = (grpc.StatusCode.UNAVAILABLE,)
    assert not any(broken_differences(one, outcomes[one.name], undisturbed[one.name], gone) for one in ALL_STREAMS)
    async with alone.coordinator(shards=3) as (_, other):
        outcomes = await other.generate_all()
        await check_tidy(alone, other)
    assert not any(differences(one, outcomes[one.name], undisturbed[one.name]) for one in ALL_STREAMS)


@pytest.mark.slow
async def test_callers_that_cancel_in_the_middle_leave_nothing(
    wide: Mesh, caller: Caller, undisturbed: dict[str, Outcome]
) -> None:
    doomed = [asyncio.create_task(caller.generate(Stream(f"doomed-{number}", GREEDY_STREAM.prompt, 400))) for number in range(4)]

    async def work() -> None:
        for stage, one in zip(Stage, doomed, strict=False):
            at_once(await spares_of(wide, caller), stage, lambda _, __, one=one: one.cancel())
        await cut(caller, 4)

    await under_streams(caller, undisturbed, work)
    await asyncio.gather(*doomed, return_exceptions=True)
    assert any(one.cancelled() for one in doomed)
    await wait_until("nothing to be left of them", lambda: is_idle(caller), RECOVERED_S)


async def is_idle(caller: Caller) -> bool:
    load = (await caller.mesh()).load
    return (load.running, load.waiting, load.used_pages) == (0, 0, 0)
