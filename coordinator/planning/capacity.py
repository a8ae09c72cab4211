"""How many tokens of KV cache a mesh can afford. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from protos import rpc
from protos.errors import OutOfMemory, TopologyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.planning.placement import Placement, WorkerReport
    from coordinator.planning.plan import MeshPlan

DEFAULT_KV_TOKENS = 65_536
"""Tokens of KV cache, unless told otherwise or memory is short."""

ROUTE_BYTES = 1024
"""Beside a row's elements: its experts and their weights, its pages; more than any model asks for."""

OVERHEAD_BYTES = 2**20
"""Of a message beside its rows; more than it ever takes."""

SHARE = 0.5
"""Part of the memory left beside the weights that the KV cache takes by default; activations and others need some too."""


def check_rows(max_rows: int, hidden: int, row_bytes: int) -> None:
    """Check that the rows of a step fit into one message to a worker.

    Args:
        max_rows: most rows of a step.
        hidden: elements of a row.
        row_bytes: of a row in the wire's dtype.

    Raises:
        TopologyError: they do not.

    """
    most = (rpc.MAX_WORKER_REQUEST_BYTES - OVERHEAD_BYTES) // (row_bytes + ROUTE_BYTES)
    if max_rows > most:
        raise TopologyError(
            f"--max-rows is {max_rows}, but a message to a worker takes at most {most} rows of {hidden} elements "
            f"in this wire's dtype: lower --max-rows or choose a smaller --wire"
        )


def kv_pages(plan: MeshPlan, reports: Sequence[WorkerReport], page_tokens: int, wanted_tokens: int | None) -> int:
    """Pages of KV cache that every worker can hold, whichever shard it gets.

    Args:
        plan: what is to be served.
        reports: of all workers; those on one host share its memory.
        page_tokens: tokens of a page.
        wanted_tokens: as asked for; None for what is usual and fits.

    Raises:
        OutOfMemory: not even one page fits, or less than was asked for.

    """
    room = max(0, _smallest_memory(reports) - max(plan.weight_bytes))
    fitting = room // (max(plan.kv_bytes_per_token) * page_tokens)
    if wanted_tokens is None:
        pages = max(1, min(math.ceil(DEFAULT_KV_TOKENS / page_tokens), int(fitting * SHARE)))
    else:
        pages = math.ceil(wanted_tokens / page_tokens)
    if pages > fitting:
        raise OutOfMemory(
            f"beside its weights the smallest worker has {room / 2**30:.2f} GiB free, room for {fitting * page_tokens} tokens of "
            f"KV cache; {pages * page_tokens} are wanted: lower --kv-tokens, add workers or quantize"
        )
    return pages


def check_beside(plan: MeshPlan, placement: Placement, reports: Sequence[WorkerReport], num_pages: int) -> None:
    """Check that workers can take a mesh beside what they hold and keep now.

    Args:
        plan: of the mesh.
        placement: of its shards.
        reports: of all workers; those on one host share its memory.
        num_pages: KV pages of each shard.

    Raises:
        OutOfMemory: a host has too little.

    """
    by_address = {report.address: report for report in reports}
    wanted: defaultdict[str, int] = defaultdict(int)
    free: dict[str, int] = {}
    for shard, address in enumerate(placement.shards):
        report, host = by_address[address], _host(address)
        weights = 0 if report.holds(plan, shard) else plan.weight_bytes[shard]
        wanted[host] += weights + plan.kv_bytes_per_token[shard] * plan.shards[shard].page_tokens * num_pages
        free[host] = min(free.get(host, report.description.memory_free_bytes), report.description.memory_free_bytes)
    for host, num_bytes in wanted.items():
        if num_bytes > free[host]:
            raise OutOfMemory(
                f"{host or 'this machine'} has {free[host] / 2**30:.2f} GiB free beside what it holds now, and its part of "
                f"{len(plan.shards)} shards takes {num_bytes / 2**30:.2f} with KV cache"
            )


def _smallest_memory(reports: Sequence[WorkerReport]) -> int:
    """Bytes that each worker of the fullest host can have for itself, with the weights that they hold now given up."""
    hosts = defaultdict(list)
    for report in reports:
        hosts[_host(report.address)].append(report.description)
    return min(
        (min(worker.memory_free_bytes for worker in host) + sum(worker.weights_bytes for worker in host)) // len(host)
        for host in hosts.values()
    )


def _host(address: str) -> str:
    return "" if address.startswith("unix:") else address.rpartition(":")[0]
