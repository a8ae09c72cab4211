"""What a round costs beyond arithmetic, beside the least that gRPC would cost: echo servers that answer the same bytes.

The echo has as many servers as the mesh has workers, each its own process on a unix socket. It is asked for the rounds of a token
in their order; each server spins as long as the median worker computed in rounds of that action. What a round took beyond
the slowest server's spinning is its overhead, by the same definition as the mesh's. Not all is equal: a spinning server leaves
its caches warm and its event loop busy, where a worker computes on threads of their own.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from coordinator.bench.echo import METHOD, Order, spun_ns
from coordinator.bench.processes import children
from coordinator.bench.statistics import Spread
from protos import rpc
from protos.errors import WorkerLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from coordinator.rounds import Round

ROUNDS = 200
"""Of the echo in one repeat, about."""
MAX_S = 5.0
"""No longer than this in one repeat."""

_WARM_UP = 10
_START_DEADLINE_S = 30.0
_ROUND_DEADLINE_S = 60.0


class Echo:
    """Echo servers and a stream to each."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Open the channels; the servers listen."""
        options = rpc.channel_options(max_send_bytes=rpc.MAX_WORKER_REQUEST_BYTES, max_receive_bytes=rpc.MAX_WORKER_REPLY_BYTES)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for address in addresses]

    async def measure(self, token: Sequence[tuple[str, Order]]) -> dict[str, list[float]]:
        """Make the rounds of a token again and again.

        Args:
            token: action and order of each round, in order; at least one.

        Returns:
            Overheads by action, microseconds.

        Raises:
            WorkerLost: a server is gone.

        """
        rounds = [(action, order.encode()) for action, order in token]
        found: dict[str, list[float]] = defaultdict(list)
        calls = [channel.stream_stream(METHOD)(timeout=_ROUND_DEADLINE_S) for channel in self._channels]
        try:
            for number in range(_WARM_UP):
                await _round(calls, rounds[number % len(rounds)][1])
            end = time.perf_counter() + MAX_S
            # Whole tokens only, so that each action has its share.
            for _ in range(max(1, ROUNDS // len(rounds))):
                for action, request in rounds:
                    found[action].append(await _round(calls, request))
                if time.perf_counter() > end:
                    break
        except grpc.aio.AioRpcError as error:
            raise WorkerLost(f"an echo server is gone: {error.details()}") from None
        finally:
            for call in calls:
                call.cancel()
        return dict(found)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()


@asynccontextmanager
async def echo_servers(folder: Path, count: int) -> AsyncIterator[Echo]:
    """Run `count` servers on sockets in a folder, which is removed by its owner."""
    addresses = [f"unix:{folder}/echo-{number}.sock" for number in range(count)]
    with children("an echo server", [("coordinator.bench.echo", address) for address in addresses]) as servers:
        for server in servers:
            await server.hear(_START_DEADLINE_S)
        echo = Echo(addresses)
        try:
            yield echo
        finally:
            await echo.close()


def token_orders(rounds: Sequence[Round]) -> list[tuple[str, Order]]:
    """Say what the echo shall do for a token of the mesh.

    Args:
        rounds: of one or more decode steps, each step alike.

    Returns:
        Action and order of each round of a step, in order: of each action the median bytes and the median compute of all workers.

    """
    by_action: dict[str, list[Round]] = defaultdict(list)
    for one in rounds:
        by_action[one.action].append(one)
    orders = {
        action: Order(
            request_bytes=round(statistics.median(one.request_bytes for one in same)),
            reply_bytes=round(statistics.median(answer.num_bytes for one in same for answer in one.answers)),
            spin_ns=round(statistics.median(answer.compute_ns for one in same for answer in one.answers)),
        )
        for action, same in by_action.items()
    }
    return [(one.action, orders[one.action]) for one in rounds if one.step == rounds[0].step]


@dataclass(frozen=True, slots=True)
class OverheadComparison:
    """Overheads of rounds, microseconds."""

    mesh: Spread
    echo: Spread | None
    """None where no echo ran."""

    @property
    def ratio(self) -> float | None:
        """Of the medians."""
        return self.mesh.median / self.echo.median if self.echo else None

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON."""
        echo = self.echo.as_dict() if self.echo else None
        return {"overhead_us": self.mesh.as_dict(), "echo_overhead_us": echo, "ratio": self.ratio}


def compare_overheads(
    mesh: Mapping[str, Sequence[float]], echo: Mapping[str, Sequence[float]]
) -> tuple[OverheadComparison, dict[str, OverheadComparison]]:
    """Compare overheads by action, microseconds: of all rounds, and of each action that both have; the echo may be empty."""
    actions = [action for action in mesh if action in echo or not echo]

    def compared(chosen: Sequence[str]) -> OverheadComparison:
        own, bare = ([value for action in chosen for value in side.get(action, ())] for side in (mesh, echo))
        return OverheadComparison(Spread.of(own), Spread.of(bare) if bare else None)

    return compared(actions), {action: compared([action]) for action in actions}


async def _round(calls: Sequence[Any], request: bytes) -> float:
    """Overhead of one round in microseconds: write to all, then read from all, as `coordinator.fanout` does."""
    start = time.perf_counter_ns()
    for call in calls:
        await call.write(request)
    replies = [await call.read() for call in calls]
    took = time.perf_counter_ns() - start
    if any(reply is grpc.aio.EOF for reply in replies):
        raise WorkerLost("an echo server ended its stream")
    return (took - max(spun_ns(reply) for reply in replies)) / 1e3
