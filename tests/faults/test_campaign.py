"""The complete campaign: each fault, at every step of a generation, on each worker and on the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import grpc
import pytest
import pytest_asyncio

from tests.faults.campaign import all_moments, prepared
from tests.faults.faults import FAULTS
from tests.faults.injury import injure
from tests.faults.mesh import Mesh, mesh_of
from tests.faults.proxy import Moment
from tests.faults.streams import ALL_STREAMS, NEW_TOKENS, Caller, Outcome, broken_differences, differences
from tests.faults.waiting import within

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.slow]


BREAKING = ("kill", "restart", "freeze", "reset", "hold")


@pytest.mark.parametrize("step", range(NEW_TOKENS))
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("fault", BREAKING)
async def test_a_worker_fails_at_every_step(  # noqa: PLR0917  # fixtures and parameters
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], fault: str, shard: int, step: int
) -> None:
    worker = (await mesh.serving(served))[shard]
    moment = all_moments(seed=100 * shard + len(fault))[step]
    before = (await served.mesh()).epoch
    await injure(mesh, served, expected, worker, moment, act=partial(FAULTS[fault], worker))
    assert (await served.mesh()).epoch > before


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def bare(mesh: Mesh) -> AsyncIterator[Mesh]:
    """Two shards and no spare."""
    async with mesh_of(mesh.model, 2) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def bare_caller(bare: Mesh) -> AsyncIterator[Caller]:
    async with bare.coordinator() as (_, caller):
        yield caller


@pytest.mark.parametrize("step", range(NEW_TOKENS))
@pytest.mark.parametrize("shard", [0, 1])
async def test_a_worker_without_a_spare_is_restarted_at_every_step(  # fixtures and parameters
    bare: Mesh, bare_caller: Caller, expected: dict[str, Outcome], shard: int, step: int
) -> None:
    worker = (await bare.serving(bare_caller))[shard]
    moment = all_moments(seed=7 + shard)[step]
    try:
        await injure(bare, bare_caller, expected, worker, moment, act=partial(FAULTS["restart"], worker))
    finally:
        await bare.mend(bare_caller)


@pytest.mark.parametrize("step", range(NEW_TOKENS))
async def test_a_coordinator_is_killed_at_every_step(mesh: Mesh, expected: dict[str, Outcome], step: int) -> None:
    moment: Moment = all_moments(seed=5)[step]
    async with mesh.coordinator() as (coordinator, caller):
        worker = (await mesh.serving(caller))[step % 2]
        sprung = prepared(mesh, worker, moment, lambda _: coordinator.program.kill())
        outcomes = await within(30, "streams of a killed coordinator to end", caller.generate_all())
        assert sprung.is_set()
    wrong = []
    for stream in ALL_STREAMS:
        wrong += broken_differences(stream, outcomes[stream.name], expected[stream.name], (grpc.StatusCode.UNAVAILABLE,))
    assert not wrong
    async with mesh.coordinator() as (_, caller):
        outcomes = await caller.generate_all()
    assert not [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]
