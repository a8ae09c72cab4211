"""All that a worker tells Prometheus, put together at each scrape; `docs/observability.md` lists every name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from protos.metrics import LoopCollector, MetricsListener, make_registry, serve_metrics
from protos.shardworker_pb2 import WORKER_STATE_LOADED
from shardworker.memory import device_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from shardworker.holding import Holding
    from shardworker.tally import RoundTally

_S = 1e9


async def listen_for_scrapes(address: str, holding: Holding) -> MetricsListener:
    """Start answering scrapes.

    Args:
        address: see `protos.metrics.serve_metrics`.
        holding: of the worker.

    Raises:
        InvalidArgument: the address is in use or cannot be taken.

    """
    registry = make_registry()

    async def collect() -> list[Metric]:
        return [*_state(holding), *_rounds(holding.tally)]

    registry.register(LoopCollector(collect))
    return await serve_metrics(address, registry)


def _state(holding: Holding) -> Iterator[Metric]:
    held, memory = holding.held(), device_memory(holding.executor.device)
    for name, text, value in (
        ("loaded", "1 while the worker holds a shard of a plan.", held.state == WORKER_STATE_LOADED),
        ("assignment", "Highest assignment that a coordinator gave.", holding.assignment),
        ("sessions", "Sessions of coordinators that are open.", len(holding.sessions)),
        ("former_plans", "Plans held beside the latest one, until their last session ends.", len(held.former)),
        ("weights_bytes", "Weights held, of all plans.", holding.weights_bytes),
        ("kv_bytes", "KV pages reserved by all sessions.", sum(session.kv_bytes for session in holding.sessions)),
        ("memory_free_bytes", "Free memory of the device.", memory.free),
        ("memory_total_bytes", "Memory of the device.", memory.total),
    ):
        yield GaugeMetricFamily(f"shardmesh_shard_{name}", text, value)


def _rounds(tally: RoundTally) -> Iterator[Metric]:
    for name, text, field, scale in (
        ("rounds", "Rounds served.", "num_rounds", 1),
        ("compute_seconds", "Arithmetic of rounds.", "compute_ns", _S),
        ("queue_seconds", "Rounds waiting for the device.", "queue_ns", _S),
    ):
        family = CounterMetricFamily(f"shardmesh_shard_{name}", text, labels=("action",))
        for action, found in tally.actions.items():
            family.add_metric((action,), getattr(found, field) / scale)
        yield family
    faults = CounterMetricFamily("shardmesh_shard_faults", "Rounds refused or failed.", labels=("reason",))
    for reason, count in tally.faults.items():
        faults.add_metric((reason,), count)
    yield faults
