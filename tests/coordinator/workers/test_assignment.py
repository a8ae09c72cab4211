"""Who may hand out plans, under which number, and what others say while they may not."""

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.planning.placement import Placement, WorkerReport
from coordinator.workers.assignment import adopt, choose_assignment, lead
from protos.errors import NotServing, PlanMismatch
from protos.shardworker_pb2 import WORKER_STATE_EMPTY, WORKER_STATE_LOADED, WORKER_STATE_LOADING, DescribeResponse, Held

DIGEST = b"p" * 32
OTHER = b"q" * 32
TERM = 1 << 32

PLAN: Any = SimpleNamespace(shards=(None, None), digest=DIGEST)


def held(shard: int, assignment: int = 0, *, digest: bytes = DIGEST) -> Held:
    return Held(state=WORKER_STATE_LOADED, plan_digest=digest, shard=shard, assignment=assignment)


EMPTY = Held(state=WORKER_STATE_EMPTY)


def reports(*states: Held) -> list[WorkerReport]:
    return [WorkerReport(f"w{number}", DescribeResponse(held=state)) for number, state in enumerate(states)]


class Lease:
    name = "mesh/plan"

    def __init__(self, term: int | None, holder: str = "c-1") -> None:
        self.term, self.holder, self.begun = term, holder, [0][:0]

    async def begin_term_after(self, term: int) -> int:
        self.begun.append(term)
        self.term = term + 1
        return self.term

    async def run(self) -> None:
        pass

    async def release(self) -> None:
        pass


PLACEMENT = Placement(("w0", "w1"), ())


@pytest.mark.parametrize(
    ("states", "term", "assignment"),
    [
        ([EMPTY, EMPTY], 3, 3 * TERM),
        ([held(0, 3 * TERM + 4), EMPTY], 3, 3 * TERM + 5),
        # A new holder raises what is held already into its own term.
        ([held(0, 2 * TERM + 4), held(1, 2 * TERM + 4)], 3, 3 * TERM),
        ([held(0, 3 * TERM + 4), held(1, 3 * TERM)], 3, 3 * TERM + 4),
        ([held(0, 17), EMPTY], 3, 3 * TERM),
        ([held(0, 17), EMPTY], 0, 18),
    ],
)
def test_a_number_is_of_the_holders_term(states: list[Held], term: int, assignment: int) -> None:
    assert choose_assignment(PLAN, PLACEMENT, reports(*states), term) == assignment


async def test_without_a_lease_a_number_follows_the_highest() -> None:
    assert await lead(PLAN, PLACEMENT, reports(held(0, 5 * TERM), EMPTY), None) == 5 * TERM + 1


async def test_who_lost_the_lease_meanwhile_hands_out_nothing() -> None:
    with pytest.raises(NotServing, match="Lease mesh/plan was lost before"):
        await lead(PLAN, PLACEMENT, reports(EMPTY, EMPTY), Lease(None))


async def test_a_lease_that_counts_anew_begins_above_what_workers_have_seen() -> None:
    lease = Lease(1)
    assert await lead(PLAN, PLACEMENT, reports(held(0, 7 * TERM + 3, digest=OTHER), EMPTY), lease) == 8 * TERM
    assert lease.begun == [7]
    assert await lead(PLAN, PLACEMENT, reports(held(0, 8 * TERM), EMPTY), lease) == 8 * TERM + 1
    assert lease.begun == [7]


def test_a_plan_that_is_held_is_adopted_from_the_preferred_workers() -> None:
    everybody = reports(held(0), held(1), held(1), EMPTY)
    assert adopt(PLAN, everybody[2:] + everybody[:1], everybody, Lease(None)) == Placement(("w0", "w2"), ("w1", "w3"))
    # Better one that failed before than none.
    assert adopt(PLAN, everybody[1:], everybody, Lease(None)).shards == ("w0", "w1")


@pytest.mark.parametrize(
    "states",
    [(EMPTY, EMPTY), (held(0), EMPTY), (held(0), held(0)), (held(0), Held(state=WORKER_STATE_LOADING, assignment=4))],
)
def test_a_plan_that_is_not_held_yet_is_waited_for(states: tuple[Held, ...]) -> None:
    found = reports(*states)
    with pytest.raises(NotServing, match="no worker holds every shard of the plan yet; c-1 holds Lease mesh/plan and may hand"):
        adopt(PLAN, found, found, Lease(None))
    with pytest.raises(NotServing, match="nobody holds Lease mesh/plan"):
        adopt(PLAN, found, found, Lease(None, ""))


def test_another_plan_is_named() -> None:
    found = reports(held(0), held(1, digest=OTHER))
    text = f"workers hold plan {OTHER.hex()[:12]}, this coordinator's is {DIGEST.hex()[:12]}, and c-1 holds Lease mesh/plan"
    with pytest.raises(PlanMismatch, match=text):
        adopt(PLAN, found, found, Lease(None))
