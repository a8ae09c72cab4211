"""`helm upgrade` while callers call: nothing is lost, and no token is another."""

import asyncio
import time

import grpc
import pytest

from tests.faults.streams import Outcome
from tests.kind.cluster import tell
from tests.kind.release import Release
from tests.kind.streams import Load

pytestmark = [pytest.mark.kind, pytest.mark.timeout(900)]

ANNOTATIONS = ("worker.podAnnotations.turn=next", "coordinator.podAnnotations.turn=next")


@pytest.mark.parametrize("rollout", ["RollingUpdate", "Recreate"])
async def test_all_pods_are_replaced_and_nothing_is_lost(release: Release, expected: dict[str, Outcome], rollout: str) -> None:
    before = {component: release.pod_names(component) for component in ("worker", "coordinator")}
    async with Load(release) as load:
        started_s = time.monotonic()
        await asyncio.to_thread(release.apply, *ANNOTATIONS, f"coordinator.rollout={rollout}")
        await asyncio.to_thread(release.wait_rolled_out)
        tell(f"upgrade of all pods, {rollout}", time.monotonic() - started_s)
        await load.wait_more()
    load.tell(f"upgrade of all pods, {rollout}")
    assert load.differences(expected) == []
    assert all(outcomes[-1].code is grpc.StatusCode.OK for outcomes in load.outcomes.values())
    for component, names in before.items():
        assert not names & release.pod_names(component)
