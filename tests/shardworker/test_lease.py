"""Sessions that are silent, and those that wait for the worker itself."""

import asyncio

import pytest

from protos import rpc
from protos.errors import StaleEpoch
from shardworker.lease import Lease


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "LEASE_S", 0.05)


async def test_silence_ends_the_session() -> None:
    with pytest.raises(StaleEpoch, match=r"the session was silent for 0\.05 s and is over"):
        async with Lease():
            await asyncio.Event().wait()


async def test_signs_of_life_keep_it() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with Lease() as lease:
        while loop.time() < started + 3 * rpc.LEASE_S:
            await asyncio.sleep(0.01)
            lease.renew()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_work_of_the_worker_is_no_silence() -> None:
    async with Lease() as lease:
        lease.suspend()
        await asyncio.sleep(3 * rpc.LEASE_S)
        lease.renew()
        await asyncio.sleep(rpc.LEASE_S / 2)


async def test_other_errors_and_cancellation_pass() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with Lease():
            raise ValueError("mine")

    async def wait() -> None:
        async with Lease():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_coordinator_may_be_silent_for_as_long_as_it_said() -> None:
    async def stay() -> None:
        async with Lease() as lease:
            lease.extend(0.2)
            await asyncio.sleep(2 * rpc.LEASE_S)
            lease.renew()
            await asyncio.Event().wait()

    with pytest.raises(StaleEpoch, match=r"silent for 0\.2 s"):
        await stay()
