"""A Kubernetes Lease: of all coordinators that share workers, one at a time hands out plans.

The holder renews it every few seconds and stops believing in it well before the others may take it, by clocks of its own process
only: a coordinator that was stopped for a while wakes up without it. Each new holder's term has a higher number, with which its
assignments begin (`coordinator.workers.assignment`): whatever a former holder still sends is refused by the workers.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import socket
import time
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from coordinator.discovery.api import ApiError, KubernetesApi
from protos.errors import InvalidArgument, MeshError, NotServing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coordinator.discovery.api import Json
    from coordinator.discovery.target import LeaseTarget

log = structlog.get_logger(__name__)

DURATION_S = 15
"""A lease that was not renewed for so long may be taken."""
BELIEF_S = 10.0
"""For so long after it sent a renewal that was accepted its holder relies on it."""
RENEW_S = 2.0
"""Pause between two renewals, or two looks at the holder."""

REQUEST_S = 5.0
"""Longest that a request may take: there is time for another one before the holder must stop believing."""

SHARDS_ANNOTATION = "shardmesh.dev/shards"
"""On the Lease: how many shards all coordinators want. Whoever may write the Lease may change it while they serve."""

_NUMBER = re.compile("[1-9][0-9]{0,4}")
_NOT_FOUND, _CONFLICT, _INVALID = 404, 409, 422


class KubernetesLease:
    """One coordinator's part in a lease."""

    def __init__(
        self, target: LeaseTarget, connect: Callable[[], Awaitable[KubernetesApi]] = KubernetesApi.connect, identity: str = ""
    ) -> None:
        """Ask nothing yet.

        Args:
            target: which Lease; it is made if it is not there.
            connect: gives a connection with fresh credentials.
            identity: of this process among the coordinators; empty: the host's name and something random.

        """
        self.name = f"{target.namespace}/{target.name}"
        self.holder = ""
        """Who holds it as far as is known; empty: nobody."""
        self._metadata: Json = {"namespace": target.namespace, "name": target.name}
        self._own_path = f"/apis/coordination.k8s.io/v1/namespaces/{target.namespace}/leases/{target.name}"
        self._identity = identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._connect = connect
        self._api: KubernetesApi | None = None
        self._writing = asyncio.Lock()
        # As the server last showed it, since when it has not changed (`time.monotonic`), and the highest term ever seen.
        self._seen: Json = {}
        self._seen_at: float | None = None
        self._highest = 0
        # While this coordinator holds it: when it last sent a renewal that was accepted.
        self._renewed_at: float | None = None
        self._shards: int | None = None
        self._shards_text: str | None = None
        self._shards_changed, self._known = asyncio.Event(), asyncio.Event()

    @property
    def term(self) -> int | None:
        """See `PlanLease.term`."""
        if self._renewed_at is None or time.monotonic() - self._renewed_at > BELIEF_S:
            return None
        return self._spec_term

    @property
    def shards(self) -> int | None:
        """See `PlanLease.shards`."""
        return self._shards

    async def wait_seen(self) -> None:
        """See `PlanLease.wait_seen`."""
        await self._known.wait()

    async def wait_shards(self, known: int | None) -> int | None:
        """See `PlanLease.wait_shards`."""
        while self._shards == known:
            self._shards_changed.clear()
            await self._shards_changed.wait()
        return self._shards

    async def ask_shards(self, num_shards: int) -> None:
        """See `PlanLease.ask_shards`."""
        try:
            async with aclosing(await self._connect()) as api:
                # Its holder writes it too, every few seconds.
                while not await _annotate(api, self._own_path, str(num_shards)):
                    pass
        except MeshError as error:
            raise NotServing(f"Lease {self.name} cannot be told how many shards are wanted: {error}") from None

    async def begin_term_after(self, term: int) -> int:
        """See `PlanLease.begin_term_after`."""
        async with self._writing:
            if self.term is None:
                raise NotServing(f"Lease {self.name} is held no more")
            try:
                await self._write(term + 1)
            except ApiError as error:
                raise NotServing(f"Lease {self.name}: {error}") from None
            return self._spec_term

    async def run(self) -> None:
        """See `PlanLease.run`.

        Raises:
            InvalidArgument: nothing says where the API server is.

        """
        told, connected = "", False
        try:
            while True:
                try:
                    async with self._writing:
                        await self._try()
                    connected, told = True, ""
                except MeshError as error:
                    if isinstance(error, InvalidArgument) and not connected:
                        raise
                    if told != str(error):
                        told = str(error)
                        log.warning("lease cannot be renewed or looked at", lease=self.name, error=told)
                    await self._disconnect()
                await asyncio.sleep(RENEW_S * random.uniform(0.8, 1.2))  # noqa: S311  # no secret
        finally:
            await self._disconnect()

    async def release(self) -> None:
        """See `PlanLease.release`."""
        if self._renewed_at is None:
            return
        self._renewed_at = None
        spec = {key: value for key, value in self._seen["spec"].items() if key != "holderIdentity"}
        try:
            async with aclosing(await self._connect()) as api:
                await api.request("PUT", self._own_path, body={**self._seen, "spec": spec}, timeout_s=REQUEST_S)
        except MeshError as error:
            # It runs out by itself.
            log.warning("lease could not be released", lease=self.name, error=str(error))
        else:
            log.info("lease released", lease=self.name)

    async def _try(self) -> None:
        """Renew the lease, or take it if it is free, or look at who has it."""
        self._api = self._api or await self._connect()
        if self._renewed_at is not None:
            try:
                await self._write(self._spec_term)
            except ApiError as error:
                if error.status not in {_NOT_FOUND, _CONFLICT}:
                    if self.term is None:
                        self._lose()
                    raise
            else:
                return
        await self._look(self._api)
        if self.holder not in {"", self._identity} and not self._has_run_out:
            self._lose()
            return
        try:
            await self._write(self._spec_term if self.holder == self._identity else self._highest + 1)
        except ApiError as error:
            self._lose()
            if error.status not in {_CONFLICT, _INVALID}:
                raise
            # Another coordinator was faster: it is there by now, or of another version.

    async def _look(self, api: KubernetesApi) -> None:
        try:
            found = await api.request("GET", self._own_path, timeout_s=REQUEST_S)
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            found = {}
        # Of the spec alone: a label that somebody sets is no sign of life.
        if self._seen_at is None or found.get("spec") != self._seen.get("spec"):
            self._seen_at = time.monotonic()
        self._take(found)
        self._known.set()

    def _take(self, found: Json) -> None:
        self._seen = found
        # Should somebody delete it, it is made anew as it was: with what it wants, and of the same Helm release.
        seen = found.get("metadata") or {}
        self._metadata |= {key: seen[key] for key in ("labels", "annotations") if seen.get(key)}
        self._read_shards()
        self._highest = max(self._highest, self._spec_term)
        holder = self._spec.get("holderIdentity") or ""
        if self.holder != holder:
            self.holder = holder
            log.info("lease changed hands", lease=self.name, holder=holder, term=self._spec_term)

    def _read_shards(self) -> None:
        text = ((self._seen.get("metadata") or {}).get("annotations") or {}).get(SHARDS_ANNOTATION)
        if text is None or text == self._shards_text:
            return
        self._shards_text = text
        if not _NUMBER.fullmatch(text):
            error = f"{SHARDS_ANNOTATION} must be a number from 1 to 99999, found {text[:32]!r}"
            log.error("the lease names no number of shards", lease=self.name, error=error)
            return
        self._shards = int(text)
        self._shards_changed.set()

    @property
    def _spec(self) -> Json:
        return self._seen.get("spec") or {}

    @property
    def _spec_term(self) -> int:
        return int(self._spec.get("leaseTransitions") or 0)

    @property
    def _has_run_out(self) -> bool:
        duration_s = self._spec.get("leaseDurationSeconds") or DURATION_S
        return self._seen_at is not None and time.monotonic() - self._seen_at > duration_s

    async def _write(self, term: int) -> None:
        """Write this coordinator into the lease, if nobody else wrote since it was read."""
        if self._api is None:
            raise ApiError("there is no connection to the Kubernetes API")
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_S,
            "acquireTime": self._spec.get("acquireTime", now) if self._renewed_at is not None else now,
            "renewTime": now,
            "leaseTransitions": term,
        }
        sent_at = time.monotonic()
        if self._seen:
            # By the version within the server knows whether somebody wrote meanwhile.
            found = await self._api.request("PUT", self._own_path, body={**self._seen, "spec": spec}, timeout_s=REQUEST_S)
        else:
            # A Lease may be made by writing to its name: the right to do that can be limited to it.
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": self._metadata, "spec": spec}
            found = await self._api.request("PUT", self._own_path, body=body, timeout_s=REQUEST_S)
        self._take(found)
        self._renewed_at = sent_at

    def _lose(self) -> None:
        if self._renewed_at is not None:
            log.warning("lease is lost", lease=self.name)
        self._renewed_at = None

    async def _disconnect(self) -> None:
        if self._api:
            await self._api.aclose()
            self._api = None


async def _annotate(api: KubernetesApi, path: str, shards: str) -> bool:
    """Write the number, unless somebody writes the Lease at the same moment."""
    found = await api.request("GET", path, timeout_s=REQUEST_S)
    # A Lease without any has null there.
    metadata = found["metadata"]
    metadata["annotations"] = {**(metadata.get("annotations") or {}), SHARDS_ANNOTATION: shards}
    try:
        await api.request("PUT", path, body=found, timeout_s=REQUEST_S)
    except ApiError as error:
        if error.status != _CONFLICT:
            raise
        return False
    return True
