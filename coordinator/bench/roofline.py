"""How near a worker's decoding is to the rate of its memory, measured by the same number of processes and threads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.bench.processes import children
from coordinator.models.spec import MoeSpec
from coordinator.planning.sizes import decode_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.models.spec import ModelSpec
    from protos.plan_pb2 import ShardPlan

SECONDS = 1.0
"""Of one measurement."""

_START_DEADLINE_S = 60.0
_SLACK_S = 30.0


@dataclass(frozen=True, slots=True)
class Roofline:
    """The memory's rate, and what decoding makes of it. Tuples are in shard order."""

    before_bytes_per_s: float
    """Of all processes together, before the measurements."""
    after_bytes_per_s: float
    """Likewise, after them."""
    bytes_per_token: tuple[float, ...]
    """That each worker has to read."""
    compute_s: tuple[float, ...]
    """Of each worker and token."""

    @property
    def bytes_per_s(self) -> float:
        """The higher one: a neighbour can only take away from it."""
        return max(self.before_bytes_per_s, self.after_bytes_per_s)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of its equal share of the rate, what each worker reads while it computes."""
        share = self.bytes_per_s / len(self.compute_s)
        return tuple(size / seconds / share for size, seconds in zip(self.bytes_per_token, self.compute_s, strict=True))

    @property
    def fraction(self) -> float:
        """Of the worker that computes longest."""
        return self.fractions[self.compute_s.index(max(self.compute_s))]

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON."""
        return {
            "bytes_per_s": self.bytes_per_s,
            "before_bytes_per_s": self.before_bytes_per_s,
            "after_bytes_per_s": self.after_bytes_per_s,
            "bytes_per_token": list(self.bytes_per_token),
            "fraction": self.fraction,
            "fractions": list(self.fractions),
        }


def token_bytes(spec: ModelSpec, shards: Sequence[ShardPlan], context_tokens: float) -> tuple[float, ...]:
    """Bytes that each worker has to read for a token after `context_tokens` others."""
    active = [block.gate.top_k if isinstance(block, MoeSpec) else 0 for block in spec.feed_forward]
    return tuple(decode_bytes(shard, active, context_tokens) for shard in shards)


async def measure_memory(num_processes: int, threads: int) -> float:
    """Read memory in as many processes and threads as a mesh computes with, all at once; bytes per second of all together.

    Raises:
        MeshError: a process fails, for example for want of memory.

    """
    command = ("shardworker", "measure-memory", "--threads", str(threads), "--seconds", str(SECONDS), "--wait")
    with children("the measurement of the memory's rate", [command] * num_processes) as readers:
        for reader in readers:
            await reader.hear(_START_DEADLINE_S)
        for reader in readers:
            reader.say("go")
        lines = [await reader.hear(SECONDS + _SLACK_S) for reader in readers]
    return float(sum(json.loads(line)["bytes_per_s"] for line in lines))
