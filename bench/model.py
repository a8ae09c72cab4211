"""What a step takes, as a formula over the model, the mesh and the network; its constants come from `coordctl bench --json`.

    step = rounds x (round + shards x shard + rtt)          what a round costs, however little it carries
         + bytes x (byte + 1 / rate)                        what its bytes cost: all of them cross the coordinator's port
         + rounds x 2 x one packet / rate                   which crosses the other end's port too
         + slowest worker's max(bytes read / its memory's rate, operations / its arithmetic's rate)

A decode step has one row for each stream; a prompt is steps of up to 512 rows. The plan says what a worker reads and multiplies:
the same arithmetic that cuts a real model. What is left out: keys and values in the operations of attention (short contexts),
TCP's slow start, and two workers that disturb each other on one machine, except as the constants already hold it.

`bench/network.py` compares it with meshes over real networks, `bench/predict.py` asks it for others.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.models.spec import MoeSpec
from coordinator.planning.plan import plan_mesh
from coordinator.planning.sizes import decode_bytes
from protos.plan_pb2 import QK_NORM_FULL, QUANTIZATION_NONE
from protos.tensor_pb2 import DTYPE_BF16
from protos.tensors import num_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.models.spec import ModelSpec
    from protos.plan_pb2 import Quantization, ShardPlan
    from protos.tensor_pb2 import DType

CHUNK_ROWS = 512
"""Rows of a step of prefill, as a coordinator takes them unless told otherwise."""
HEADER_BYTES = 170
"""Of a message beyond its tensors: about 60 of protobuf's, and the headers of HTTP/2, TCP, IP and Ethernet. Assumed."""
PACKET_BYTES = 1514


@dataclass(frozen=True, slots=True)
class Network:
    """Between coordinator and workers; every machine has one port."""

    rtt_s: float = 0.0
    bytes_per_s: float = math.inf
    """Of each port in each direction."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a mesh costs without its network."""

    round_s: float
    """Of a round beyond its slowest worker's arithmetic, the coordinator's work between rounds included."""
    shard_s: float
    """More for each worker."""
    byte_s: float
    """More for each byte that the coordinator sends or gets."""
    bytes_per_s: float
    """What one worker reads while it decodes one row."""
    operations_per_s: float
    """What one worker multiplies and adds (two operations) while it computes many rows."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is made of."""

    rounds: int
    shards: int
    bytes: float
    """Of all rounds, there and back, all workers."""
    read_bytes: float
    """Weights, keys and values that the worker with the most of them has to read."""
    operations: float
    """Of the worker with the most of them."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """A model, cut."""

    spec: ModelSpec
    shards: tuple[ShardPlan, ...]
    wire: DType
    whole: tuple[ShardPlan, ...]
    """The same shards in bf16: two bytes of it are one weight."""

    @classmethod
    def cut(cls, spec: ModelSpec, num_shards: int, *, dtype: DType, quantization: Quantization, wire: DType) -> Mesh:
        """Cut a model into shards.

        Raises:
            TopologyError: it cannot be cut into so many.

        """
        shards = plan_mesh(spec, None, num_shards, dtype=dtype, quantization=quantization).shards
        whole = plan_mesh(spec, None, num_shards, dtype=DTYPE_BF16, quantization=QUANTIZATION_NONE).shards
        return cls(spec, shards, wire, whole)

    def step(self, rows: int, sampled: int, context_tokens: float) -> Work:
        """Describe a step.

        Args:
            rows: in it.
            sampled: sequences that get a token by it; only these rows reach the head.
            context_tokens: keys and values that are read, of all sequences together.

        """
        spec = self.spec
        blocks = spec.feed_forward
        touched = [distinct_experts(block, rows) for block in blocks]
        chosen = [block.gate.top_k if isinstance(block, MoeSpec) else 0 for block in blocks]
        attention_rounds = spec.num_layers * (2 if spec.attention.qk_norm == QK_NORM_FULL else 1)
        # Of the last layer's feed-forward block and of the head only the rows that are sampled are wanted.
        last = 2 if sampled else 0
        messages = (attention_rounds + spec.num_layers - 1) * self._message_bytes(rows) + last * self._message_bytes(sampled)
        routes = 8 * (rows * sum(chosen[:-1]) + sampled * chosen[-1])
        rounds = attention_rounds + spec.num_layers - 1 + last
        heads = [spec.hidden * (plan.vocabulary.end - plan.vocabulary.start) for plan in self.shards]
        weights = [decode_bytes(plan, chosen, 0) / 2 - head for plan, head in zip(self.whole, heads, strict=True)]
        return Work(
            rounds=rounds,
            shards=len(self.shards),
            bytes=len(self.shards) * (2 * messages + routes),
            read_bytes=max(decode_bytes(plan, touched, context_tokens) for plan in self.shards),
            operations=2 * max(rows * weight + sampled * head for weight, head in zip(weights, heads, strict=True)),
        )

    def _message_bytes(self, rows: int) -> int:
        return num_bytes(self.wire, (rows, self.spec.hidden)) + HEADER_BYTES

    def prefill(self, prompt_tokens: int) -> list[Work]:
        """Describe the steps of one prompt."""
        starts = range(0, prompt_tokens, CHUNK_ROWS)
        ends = [min(start + CHUNK_ROWS, prompt_tokens) for start in starts]
        return [self.step(end - start, int(end == prompt_tokens), end) for start, end in zip(starts, ends, strict=True)]


def distinct_experts(block: object, rows: int) -> int:
    """Experts of a layer that at least one of `rows` goes to, if each row's are drawn evenly; 0 in a dense layer."""
    if not isinstance(block, MoeSpec):
        return 0
    count, top_k = block.gate.num_experts, block.gate.top_k
    return round(count * (1 - (1 - top_k / count) ** rows))


def step_s(work: Work, costs: Costs, network: Network) -> float:
    """Time of a step, seconds."""
    one_way = work.bytes / work.rounds / work.shards / 2
    packets_s = 2 * min(one_way, PACKET_BYTES) / network.bytes_per_s
    rounds_s = work.rounds * (costs.round_s + work.shards * costs.shard_s + network.rtt_s + packets_s)
    bytes_s = work.bytes * (costs.byte_s + 1 / network.bytes_per_s)
    return rounds_s + bytes_s + max(work.read_bytes / costs.bytes_per_s, work.operations / costs.operations_per_s)


def calibrate(reports: Sequence[dict[str, Any]], meshes: Sequence[Mesh]) -> Costs:
    """Take the constants from what `coordctl bench --json` said.

    A byte costs what the rounds of a prompt took more than those of a token. A shard costs the slope over meshes of unlike size
    (least squares), nothing with one size. The rates are what workers read for a token and multiplied for a prompt, medians.

    Args:
        reports: of one machine in one hour.
        meshes: the mesh of each.

    """
    byte_s = max(0.0, statistics.median(map(_byte_s, reports)))
    beyond = [_round_s(report["per_token"]) - byte_s * _round_bytes(report["per_token"]) for report in reports]
    sizes = [float(report["shards"]) for report in reports]
    shard_s = max(0.0, statistics.linear_regression(sizes, beyond).slope) if len(set(sizes)) > 1 else 0.0
    return Costs(
        round_s=statistics.fmean(beyond) - shard_s * statistics.fmean(sizes),
        shard_s=shard_s,
        byte_s=byte_s,
        bytes_per_s=statistics.median(map(_bytes_per_s, reports, meshes)),
        operations_per_s=statistics.median(map(_operations_per_s, reports, meshes)),
    )


def decode_work(mesh: Mesh, streams: int, prompt_tokens: int, new_tokens: int) -> Work:
    """Describe the middle one of the decode steps of some streams."""
    return mesh.step(streams, streams, streams * (prompt_tokens + new_tokens / 2))


def _round_s(cost: dict[str, float]) -> float:
    return (cost["wire_ms"] + cost["coordinator_ms"]) / cost["rounds"] / 1e3


def _round_bytes(cost: dict[str, float]) -> float:
    return (cost["bytes_sent"] + cost["bytes_received"]) / cost["rounds"]


def _byte_s(report: dict[str, Any]) -> float:
    token, prompt = report["per_token"], report["per_prompt"]
    return (_round_s(prompt) - _round_s(token)) / (_round_bytes(prompt) - _round_bytes(token))


def _bytes_per_s(report: dict[str, Any], mesh: Mesh) -> float:
    work = decode_work(mesh, 1, report["prompt_tokens"], report["new_tokens"])
    return work.read_bytes / float(report["per_token"]["compute_ms"]) * 1e3


def _operations_per_s(report: dict[str, Any], mesh: Mesh) -> float:
    """Operations of a prompt by the time of their arithmetic, reading included; no fewer than decoding made."""
    token = decode_work(mesh, 1, report["prompt_tokens"], report["new_tokens"])
    prompt = sum(step.operations for step in mesh.prefill(report["prompt_tokens"]))
    pairs = ((prompt, report["per_prompt"]), (token.operations, report["per_token"]))
    return max(operations / float(cost["compute_ms"]) * 1e3 for operations, cost in pairs)
