"""`helm upgrade --set shards=4` while streams run."""

import asyncio
import time

import pytest

from tests.faults.streams import Outcome
from tests.faults.waiting import wait_until
from tests.kind.cluster import tell
from tests.kind.release import Release
from tests.kind.streams import Load

pytestmark = [pytest.mark.kind, pytest.mark.timeout(900)]

RESHARDED_S = 180.0


async def test_streams_outlive_a_change_from_two_shards_to_four(release: Release, expected: dict[str, Outcome]) -> None:
    before = release.pod_names("coordinator")
    async with release.caller() as caller, Load(release) as load:
        assert (await caller.mesh()).num_shards == 2
        started_s = time.monotonic()
        await asyncio.to_thread(release.change, "shards=4")

        async def has_four() -> bool:
            mesh = await caller.mesh()
            return mesh.serving and mesh.num_shards == 4

        await wait_until("a mesh of four shards", has_four, RESHARDED_S)
        tell("two shards to four, from helm upgrade on", time.monotonic() - started_s)
        await load.wait_more()
    load.tell("two shards to four")
    assert load.differences(expected) == []
    # No coordinator was started anew for it, and nobody refused.
    assert release.pod_names("coordinator") == before
    assert [one for outcomes in load.outcomes.values() for one in outcomes if not one.tokens] == []
