"""Metrics for Prometheus, on a listener of their own: plain HTTP, open to whoever reaches it, and nothing but numbers there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.registry import Collector

from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import Metric

_SCRAPE_S = 8.0
"""Longest that a scrape waits for the event loop: Prometheus itself gives up after 10 s by default."""


class LoopCollector(Collector):
    """Has an event loop say what there is: threads of the HTTP server never look at what the loop changes meanwhile."""

    def __init__(self, collect: Callable[[], Awaitable[list[Metric]]]) -> None:
        """Take the running loop; `collect` runs on it once for each scrape."""
        self._collect = collect
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Metric]:
        """Say nothing beforehand: it would take a scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Ask the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(self._bounded(), self._loop).result()

    async def _bounded(self) -> list[Metric]:
        async with asyncio.timeout(_SCRAPE_S):
            return await self._collect()


@dataclass(frozen=True, slots=True)
class MetricsListener:
    """A running HTTP server."""

    url: str
    _server: WSGIServer

    async def stop(self) -> None:
        """Take no more connections."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def make_registry() -> CollectorRegistry:
    """Make a registry with what is known of every process: `process_*`, `python_gc_*`, `python_info`."""
    # When each series began is known to Prometheus: without this there would be a second one for each.
    disable_created_metrics()
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


async def serve_metrics(address: str, registry: CollectorRegistry) -> MetricsListener:
    """Start answering scrapes.

    Args:
        address: `HOST:PORT`, port 0 for any free one; checked by `protos.rpc.check_metrics_address`.
        registry: of what there is to say.

    Raises:
        InvalidArgument: the address is in use or cannot be taken.

    """
    host, _, port = address.rpartition(":")
    try:
        # In a thread: it looks the host's name up.
        server, _ = await asyncio.to_thread(start_http_server, int(port), host.strip("[]"), registry)
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {address} for metrics: {error.strerror or error}") from None
    return MetricsListener(f"http://{host}:{server.server_port}/metrics", server)
