"""kill -9 of a worker at a sample of moments: every stream goes on with the same tokens. `test_campaign.py` has all moments."""

from __future__ import annotations

from functools import partial

import pytest

from tests.faults.campaign import sampled_moments
from tests.faults.faults import FAULTS
from tests.faults.injury import injure
from tests.faults.mesh import Mesh
from tests.faults.proxy import Moment
from tests.faults.streams import Caller, Outcome

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest.mark.parametrize(("number", "moment"), list(enumerate(sampled_moments(4, seed=1))), ids=str)
async def test_a_killed_worker_is_replaced_by_a_spare(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], number: int, moment: Moment
) -> None:
    worker = (await mesh.serving(served))[number % 2]
    before = await served.mesh()
    await injure(mesh, served, expected, worker, moment, act=partial(FAULTS["kill"], worker))
    assert worker not in await mesh.serving(served)
    after = await served.mesh()
    assert (after.epoch, after.recovery.recoveries) == (before.epoch + 1, before.recovery.recoveries + 1)
    assert after.recovery.failures["WORKER_LOST"] == before.recovery.failures["WORKER_LOST"] + 1
