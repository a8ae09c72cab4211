"""Under which assignment plans are handed out, and whether this coordinator may at all.

An assignment number carries the holder's term of the lease in its high half, so that whoever held the lease before is refused by
every worker to which the present holder has handed out a plan. Without a lease the term is 0, and a number follows the highest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.planning.placement import Placement, holders
from protos.errors import MeshError, NotServing, PlanMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coordinator.discovery.interfaces import PlanLease
    from coordinator.planning.placement import WorkerReport
    from coordinator.planning.plan import MeshPlan

_TERM_BITS = 32
_MAX_ASSIGNMENT = 2**64 - 1
_DIGEST_CHARACTERS = 12


def choose_assignment(plan: MeshPlan, placement: Placement, reports: Iterable[WorkerReport], term: int = 0) -> int:
    """Keep the assignment of a mesh that holds the plan already; otherwise plans are handed out anew under a higher one.

    Args:
        plan: to be handed out.
        placement: to whom.
        reports: of all workers.
        term: of the lease; 0 without one.

    Raises:
        PlanMismatch: a worker takes no assignment any more.

    """
    by_address = {report.address: report for report in reports}
    highest = max((report.description.held.assignment for report in by_address.values()), default=0)
    complete = all(by_address[address].holds(plan, shard) for shard, address in enumerate(placement.shards))
    if not complete and highest >= _MAX_ASSIGNMENT:
        raise PlanMismatch("a worker has accepted the highest assignment that there is: start it anew")
    return max(highest if complete else highest + 1, term << _TERM_BITS)


async def lead(plan: MeshPlan, placement: Placement, reports: Sequence[WorkerReport], lease: PlanLease | None) -> int:
    """Choose the assignment of plans that this coordinator may hand out.

    Raises:
        NotServing: it holds the lease no more.

    """
    if lease is None:
        return choose_assignment(plan, placement, reports)
    term = lease.term
    if term is None:
        raise NotServing(f"Lease {lease.name} was lost before the plan was handed out")
    seen = max((report.description.held.assignment for report in reports), default=0) >> _TERM_BITS
    if seen > term:
        term = await lease.begin_term_after(seen)
    return choose_assignment(plan, placement, reports, term)


def adopt(plan: MeshPlan, preferred: Sequence[WorkerReport], reports: Sequence[WorkerReport], lease: PlanLease) -> Placement:
    """Find the workers to which the lease's holder has handed out the plan.

    Args:
        plan: of this coordinator.
        preferred: workers to be taken if they hold all shards.
        reports: of all workers.
        lease: that somebody else holds.

    Raises:
        NotServing: a shard is held by nobody yet.
        PlanMismatch: likewise, and workers hold another plan.

    """
    for candidates in (preferred, reports):
        found = holders(plan, candidates)
        if len(found) == len(plan.shards):
            shards = tuple(found[shard].address for shard in range(len(plan.shards)))
            return Placement(shards, tuple(report.address for report in reports if report.address not in shards))
    raise _explain(plan, reports, lease)


def _explain(plan: MeshPlan, reports: Iterable[WorkerReport], lease: PlanLease) -> MeshError:
    holder = f"{lease.holder} holds" if lease.holder else "nobody holds"
    digests = {report.description.held.plan_digest for report in reports} - {plan.digest, b""}
    if not digests:
        return NotServing(f"no worker holds every shard of the plan yet; {holder} Lease {lease.name} and may hand it out")
    return PlanMismatch(
        f"workers hold plan {', '.join(sorted(map(_show, digests)))}, this coordinator's is {_show(plan.digest)}, and {holder} "
        f"Lease {lease.name}: it hands out nothing and waits for its plan or the Lease; coordinators that share workers need "
        "the same --model, --dtype and --quantize, and want the same number of shards"
    )


def _show(digest: bytes) -> str:
    return digest.hex()[:_DIGEST_CHARACTERS]
