"""The workers that a coordinator was given, and how a full mesh is made of them.

Who gets which shard is decided by `coordinator.planning.placement`; this file acts: describe, load, open. A worker that failed
a mesh is passed over for a while if there are enough others: one that hangs may answer again, and one that lies always does.

Workers may come and go. One that went away is not asked any more; the session of one that serves goes on until it breaks. Where
coordinators share workers by a lease, only its holder hands out plans that workers do not hold yet; the others adopt the plan.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import structlog

from coordinator.fanout import Fanout
from coordinator.planning.capacity import check_beside
from coordinator.planning.placement import place
from coordinator.workers.assignment import adopt, lead
from coordinator.workers.loading import load, load_all
from coordinator.workers.roster import Roster
from coordinator.workers.supplier import Supplier
from protos import rpc
from protos.errors import MeshError, NotServing, PlanMismatch, PositionMismatch, StaleEpoch, StepMismatch
from protos.shardworker_pb2 import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from coordinator.discovery.interfaces import PlanLease
    from coordinator.planning.placement import WorkerReport
    from coordinator.planning.plan import MeshPlan
    from coordinator.rounds import RoundObserver
    from coordinator.workers.client import WorkerClient
    from coordinator.workers.loading import LoadEvent
    from coordinator.workers.roster import Survey
    from protos.certificates import Certificates

log = structlog.get_logger(__name__)


AVOID_S = 60.0
"""How long a worker that failed is passed over, if there are others."""

_FENCES = (PlanMismatch, PositionMismatch, StaleEpoch, StepMismatch)


class WorkerPool:
    """Clients of all workers, serving ones and spares alike."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        round_timeout_s: float = rpc.ROUND_TIMEOUT_S,
        lease_s: float = rpc.LEASE_S,
        observer: RoundObserver | None = None,
        certificates: Certificates | None = None,
        lease: PlanLease | None = None,
        supplies: bool = False,
    ) -> None:
        """Make the clients; nothing is sent yet.

        Args:
            addresses: distinct, each checked by `protos.rpc.check_address`; `follow` may change them.
            round_timeout_s: of the meshes made here: longest that a round of a few rows may take.
            lease_s: of the meshes made here: longest that a session is silent while this coordinator is sound.
            observer: told of each round of the meshes made here.
            certificates: for TLS to the workers reached by TCP; None for plaintext.
            lease: that decides who hands out plans; None: this coordinator may.
            supplies: whether the model's files are sent to the workers, who need not see them.

        """
        self._round_timeout_s = round_timeout_s
        self._lease_s = lease_s
        # Until when, `time.monotonic`.
        self._avoided: dict[str, float] = {}
        # Why workers could not be used, as far as the log tells already.
        self._told: dict[str, str] = {}
        self._roster = Roster(addresses, certificates)
        self._lease = lease
        self._supplies = supplies
        self._observer = observer
        self._secret = os.urandom(32)
        self._epoch = 0

    def blame(self, error: MeshError, addresses: Iterable[str]) -> None:
        """Pass over workers for `AVOID_S` seconds, if there are enough others, unless the error is a sound worker's refusal."""
        if not isinstance(error, _FENCES):
            self._avoided.update(dict.fromkeys(addresses, time.monotonic() + AVOID_S))

    @property
    def clients(self) -> dict[str, WorkerClient]:
        """Of the workers that there are now, by address."""
        return self._roster.clients

    def follow(self, addresses: Sequence[str]) -> None:
        """Take another set of workers: newcomers may be needed; of those that went away, sessions go on until they break."""
        self._roster.follow(addresses)

    async def wait_changed(self, timeout_s: float) -> None:
        """Wait until workers come or go, but no longer than `timeout_s` seconds."""
        await self._roster.wait_changed(timeout_s)

    async def survey(self, *, wait_for_ready: bool, enough: int | None = None) -> Survey:
        """Ask all workers what they are and hold; see `Roster.survey`."""
        return await self._roster.survey(wait_for_ready=wait_for_ready, enough=enough)

    def require(self, survey: Survey, needed: int) -> None:
        """Log who cannot be used, and check that enough workers answered.

        Raises:
            NotServing: there are too few workers.
            MeshError: why one of those that are needed cannot be used.

        """
        failures = {address: str(failure) for address, failure in survey.failures.items()}
        for address, error in failures.items():
            # Once, however often it is asked.
            if self._told.get(address) != error:
                log.warning("worker cannot be used", worker=address, error=error)
        self._told = failures
        if len(survey.reports) < needed:
            if survey.failures:
                raise next(iter(survey.failures.values()))
            raise NotServing(f"{needed} shards need {needed} workers, found {len(survey.reports)}: waiting for more")

    async def assemble(
        self,
        plan: MeshPlan,
        directory: Path | None,
        num_pages: int,
        on_progress: Callable[[LoadEvent], None],
        *,
        beside: Sequence[str] = (),
    ) -> Fanout:
        """Make a full mesh: place the shards, load them, open the sessions.

        Args:
            plan: what to serve.
            directory: of the model's files, as the workers see it unless they are supplied; None with random weights.
            num_pages: KV pages of each shard.
            on_progress: called for each step of loading.
            beside: addresses of a mesh of another plan that serves on meanwhile: what they hold stays.

        Raises:
            OutOfMemory: with `beside`: the workers have no room for both.
            MeshError: too few workers, or one of those needed refuses or dies.

        """
        needed = len(plan.shards)
        survey = await self.survey(wait_for_ready=False, enough=needed)
        if len(survey.reports) < needed:
            survey = await self.survey(wait_for_ready=True, enough=needed)
        self.require(survey, needed)
        preferred = self._preferred(survey.reports, needed)
        # Workers that serve already come last.
        preferred.sort(key=lambda report: report.address in beside)
        if self._lease and self._lease.term is None:
            placement, assignment = adopt(plan, preferred, survey.reports, self._lease), None
        else:
            placement = place(plan, preferred)
            # Of all, also of those that are passed over: their assignments count too.
            assignment = await lead(plan, placement, survey.reports, self._lease)
        if beside:
            check_beside(plan, placement, survey.reports, num_pages)
        self._roster.engage((*beside, *placement.shards))
        if assignment is not None:
            requests = self._requests(plan, assignment, directory, beside=bool(beside))
            await self._hand_out(requests, placement.shards, directory, on_progress)
        return await self._open(plan, placement.shards, num_pages)

    async def _open(self, plan: MeshPlan, addresses: Sequence[str], num_pages: int) -> Fanout:
        self._epoch += 1
        fanout = Fanout(
            [self._roster.engaged[address].execute() for address in addresses],
            plan.digest,
            self._epoch,
            timeout_s=self._round_timeout_s,
            observer=self._observer,
        )
        try:
            await fanout.open(self._identity_for(plan), num_pages, self._lease_s)
        except MeshError as error:
            self.blame(error, (fanout.addresses[shard] for shard in error.shards))
            fanout.close()
            raise
        except BaseException:
            fanout.close()
            raise
        return fanout

    async def tidy(self, plan: MeshPlan, directory: Path | None, serving: Sequence[str]) -> None:
        """Have workers let go of what nobody uses, as far as they can be asked: of other plans, and spares that hold one of all.

        Args:
            plan: of the mesh that serves.
            directory: of the model's files, as for `assemble`.
            serving: addresses of its workers, in shard order.

        """
        if self._lease and self._lease.term is None:
            # The holder does, who knows what is handed out.
            return
        reports = {report.address: report for report in (await self.survey(wait_for_ready=False)).reports}
        # Of a plan that is held the assignment does not count; it becomes the latest, and the others go.
        requests = self._requests(plan, 1, directory, beside=True)
        work: list[Coroutine[Any, Any, None]] = [
            load(self._roster.engaged[address], request, None, lambda _: None)
            for address, request in zip(serving, requests, strict=True)
            if address in reports and reports[address].description.held.plan_digest != plan.digest
        ]
        work += [
            self.clients[address].release(report.description.held.assignment)
            for address, report in reports.items()
            if address not in serving and address in self.clients and report.is_idle_with_another(plan)
        ]
        for error in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(error, MeshError):
                log.info("a worker keeps what nobody uses", error=str(error))
            elif error:
                raise error

    async def close(self) -> None:
        """Close all channels."""
        await self._roster.close()

    def _preferred(self, reports: Sequence[WorkerReport], needed: int) -> list[WorkerReport]:
        """Leave out whoever is to be avoided; if too few remain, those avoided longest ago come back."""
        now = time.monotonic()
        self._avoided = {address: until for address, until in self._avoided.items() if until > now}
        avoided = sorted(
            (report for report in reports if report.address in self._avoided),
            key=lambda report: self._avoided[report.address],
        )
        left_out = avoided[max(0, needed - (len(reports) - len(avoided))) :]
        return [report for report in reports if report not in left_out]

    def _identity_for(self, plan: MeshPlan) -> bytes:
        """Of this process and one plan: sessions end older ones of the same identity, and those of another plan serve on."""
        return hashlib.blake2b(plan.digest, key=self._secret, digest_size=rpc.COORDINATOR_BYTES).digest()

    def _requests(self, plan: MeshPlan, assignment: int, directory: Path | None, *, beside: bool) -> list[LoadRequest]:
        supplied = self._supplies and directory is not None
        return [
            LoadRequest(
                protocol_version=rpc.PROTOCOL_VERSION,
                plan=shard,
                shard_digests=plan.shard_digests,
                assignment=assignment,
                directory=str(directory) if directory and not supplied else "",
                supplied=supplied,
                beside=beside,
            )
            for shard in plan.shards
        ]

    async def _hand_out(
        self,
        requests: Sequence[LoadRequest],
        addresses: Sequence[str],
        directory: Path | None,
        on_progress: Callable[[LoadEvent], None],
    ) -> None:
        supplied = directory if requests[0].supplied else None
        with Supplier(supplied, requests[0].plan.files) if supplied else nullcontext() as supplier:
            await load_all(
                self._load(address, request, supplier, on_progress) for address, request in zip(addresses, requests, strict=True)
            )

    async def _load(
        self, address: str, request: LoadRequest, supplier: Supplier | None, on_progress: Callable[[LoadEvent], None]
    ) -> None:
        try:
            await load(self._roster.engaged[address], request, supplier, on_progress)
        except MeshError as error:
            self.blame(error, [address])
            raise
