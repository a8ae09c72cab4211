"""The wait for the first mesh."""

import asyncio

import pytest
from structlog.testing import capture_logs

from coordinator.attempts import RETRY_S, heals_by_itself, until_mesh
from protos.errors import (
    MeshError,
    ModelError,
    NotServing,
    OutOfMemory,
    PlanMismatch,
    ProtocolMismatch,
    StaleEpoch,
    TopologyError,
    WorkerLost,
)


class Attempts:
    """Fails as it is told, then gives a mesh; counts, and what was waited."""

    def __init__(self, *failures: MeshError) -> None:
        self.failures = list(failures)
        self.num = 0
        self.waits: list[float] = []

    async def attempt(self) -> str:
        self.num += 1
        if self.failures:
            raise self.failures.pop(0)
        return "mesh"

    async def wait_changed(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)
        await asyncio.sleep(0)

    async def run(self, timeout_s: float | None) -> str:
        return await until_mesh(self.attempt, self.wait_changed, timeout_s=timeout_s, heals=heals_by_itself)


async def test_it_is_tried_until_there_is_a_mesh_and_each_reason_is_logged_once() -> None:
    attempts = Attempts(NotServing("found 0"), NotServing("found 0"), WorkerLost("a"), NotServing("found 0"))
    with capture_logs() as lines:
        assert await attempts.run(None) == "mesh"
    assert [line["error"] for line in lines] == ["found 0", "a", "found 0"]
    assert len(attempts.waits) == 4
    assert all(0.5 * RETRY_S <= wait <= 1.5 * RETRY_S for wait in attempts.waits)


async def test_without_a_wait_the_first_reason_is_the_end() -> None:
    attempts = Attempts(WorkerLost("nobody"))
    with pytest.raises(WorkerLost, match="nobody"):
        await attempts.run(0)
    assert attempts.num == 1


async def test_when_the_time_is_up_the_latest_reason_is_told() -> None:
    attempts = Attempts(*[WorkerLost(f"try {number}") for number in range(100_000)])
    with pytest.raises(NotServing, match=r"no mesh within 0\.05 s \(--startup-timeout\): try \d+"):
        await attempts.run(0.05)
    assert attempts.num > 1
    assert all(0 < wait <= 0.05 for wait in attempts.waits)


async def test_an_attempt_may_take_longer_than_workers_are_waited_for() -> None:
    attempts = Attempts(NotServing("found 0"))

    async def slow() -> str:
        if attempts.num:
            await asyncio.sleep(0.05)
        return await attempts.attempt()

    assert await until_mesh(slow, attempts.wait_changed, timeout_s=0.02, heals=heals_by_itself) == "mesh"


@pytest.mark.parametrize("error", [ModelError, OutOfMemory, ProtocolMismatch, TopologyError])
async def test_what_does_not_heal_ends_it_at_once(error: type[MeshError]) -> None:
    attempts = Attempts(error("x"))
    with pytest.raises(error):
        await attempts.run(None)
    assert attempts.num == 1


@pytest.mark.parametrize("error", [WorkerLost, NotServing, PlanMismatch, StaleEpoch])
async def test_workers_that_start_later_and_another_coordinator_that_starts_now_are_waited_for(error: type[MeshError]) -> None:
    attempts = Attempts(error("not yet"), error("not yet"))
    assert await attempts.run(60.0) == "mesh"
