"""Source and lease of one coordinator, opened from what it was told, and run."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from coordinator.discovery.dns import DnsSource
from coordinator.discovery.endpoint_slices import EndpointSliceSource
from coordinator.discovery.lease import KubernetesLease
from coordinator.discovery.target import DnsTarget, read_lease, read_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.discovery.interfaces import PlanLease, WorkerSource


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Where a coordinator finds workers, and how it agrees with other coordinators."""

    source: WorkerSource | None = None
    """None: the workers are those that were listed."""
    lease: PlanLease | None = None
    """None: this coordinator hands out plans as it needs them."""
    _answered: asyncio.Event = field(default_factory=asyncio.Event, compare=False)

    @classmethod
    def open(cls, discover: str | None, lease: str | None) -> Self:
        """Read the flags; nothing is asked yet.

        Raises:
            InvalidArgument: one of them cannot be read.

        """
        source: WorkerSource | None = None
        if discover:
            target = read_target(discover)
            source = DnsSource(target) if isinstance(target, DnsTarget) else EndpointSliceSource(target)
        return cls(source, KubernetesLease(read_lease(lease)) if lease else None)

    async def run(self, on_addresses: Callable[[tuple[str, ...]], None]) -> None:
        """Tell of all addresses whenever they change, and keep the lease; ends if there is neither.

        Raises:
            InvalidArgument: the Kubernetes API was asked for, and nothing says where it is.

        """
        tasks = [asyncio.ensure_future(self._follow(self.source, on_addresses))] if self.source else []
        if self.lease:
            tasks.append(asyncio.ensure_future(self.lease.run()))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_answered(self, timeout_s: float) -> None:
        """Wait for the first answer of the source, if there is one, but no longer than `timeout_s` seconds."""
        if self.source:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._answered.wait()

    async def _follow(self, source: WorkerSource, on_addresses: Callable[[tuple[str, ...]], None]) -> None:
        try:
            async for addresses in source.addresses():
                on_addresses(addresses)
                self._answered.set()
        finally:
            self._answered.set()
