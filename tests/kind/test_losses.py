"""Pods are lost while streams run."""

import asyncio
import time

import pytest

from protos.generation_pb2 import GetMeshResponse
from tests.faults.streams import Caller, Outcome
from tests.faults.waiting import wait_until
from tests.kind.cluster import poll, tell
from tests.kind.release import Release
from tests.kind.streams import Load

pytestmark = [pytest.mark.kind, pytest.mark.timeout(900)]

LEASE_S = 90.0
HEALED_S = 90.0


async def serving_worker(release: Release, caller: Caller) -> str:
    """Name of a pod that holds a shard."""
    addresses = {worker.address.rpartition(":")[0] for worker in (await caller.mesh()).workers if worker.serving}
    return min(pod["metadata"]["name"] for pod in release.pods("worker") if pod["status"]["podIP"] in addresses)


async def test_streams_outlive_the_pod_of_a_shard(release: Release, expected: dict[str, Outcome]) -> None:
    async with release.caller() as caller, Load(release) as load:
        before = await caller.mesh()
        victim = await serving_worker(release, caller)
        words = ("delete", "pod", victim, "--grace-period=0", "--force", "--wait=false")
        await asyncio.to_thread(release.namespace.kubectl, *words)

        async def recovery() -> GetMeshResponse | None:
            mesh = await caller.mesh()
            told = mesh.recovery.recoveries > before.recovery.recoveries and mesh.recovery.last_replay_ns
            return mesh if mesh.serving and told else None

        after = await wait_until("a recovery that is told to its end", recovery, HEALED_S)
        await load.wait_more()
    assert load.differences(expected) == []
    assert after.epoch > before.epoch
    told = after.recovery
    parts_ns = (told.last_detect_ns, told.last_assemble_ns, told.last_canary_ns, told.last_replay_ns)
    for what, nanoseconds in zip(("noticed", "assembled", "proven", "replayed"), parts_ns, strict=True):
        tell(f"worker pod deleted: {what}", nanoseconds / 1e9)
    load.tell("worker pod deleted")
    assert victim not in release.pod_names("worker")
    poll("another pod in its place", lambda: len(release.pod_names("worker")) == len(before.workers), HEALED_S)


async def test_streams_of_a_coordinator_outlive_the_one_that_holds_the_lease(
    release: Release, expected: dict[str, Outcome]
) -> None:
    release.apply("coordinator.replicas=2")
    release.wait_rolled_out()
    holder = poll("a holder of the lease", release.lease_holder, LEASE_S)
    pods = release.pod_names("coordinator")
    assert holder in pods
    (other,) = pods - {holder}
    async with release.caller(other) as caller, Load(release, other) as load:
        before = await caller.mesh()
        started_s = time.monotonic()
        await asyncio.to_thread(release.namespace.kubectl, "delete", "pod", holder, "--wait=false")
        await asyncio.to_thread(poll, "another holder", lambda: release.lease_holder() not in {"", holder}, LEASE_S)
        tell("lease holder deleted: another one after", time.monotonic() - started_s)
        await load.wait_more()
        await asyncio.to_thread(release.wait_rolled_out)
        await load.wait_more()
        assert (await caller.mesh()).recovery.recoveries == before.recovery.recoveries
    load.tell("lease holder deleted, the other's callers")
    assert load.differences(expected) == []
    assert [one for outcomes in load.outcomes.values() for one in outcomes if not one.tokens] == []
    assert release.lease_holder() in release.pod_names("coordinator")
    assert len(release.pod_names("coordinator")) == 2
