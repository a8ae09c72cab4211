"""What a plan asks to be kept in memory, and from which slices of the checkpoint each piece is filled.

q, k and v stand in one weight, gate and up in another: one product each instead of five. On the meta device a layout takes
no memory and still knows its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos import plan_pb2 as pb
from protos.tensors import TORCH_DTYPES
from shardworker.kernels.linear import DenseWeight
from shardworker.plan import length, selected_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardworker.kernels.interface import Kernels, Weight

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's; `heads` and `kv_heads` are this shard's."""

    qkv: Weight  # [(heads + 2 * kv_heads) * head_dim, hidden]
    o: Weight  # [hidden, heads * head_dim]
    qkv_bias: torch.Tensor | None
    o_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [heads + kv_heads, head_dim], of the queries first


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """A dense block or a shared expert."""

    gate_up: Weight  # [2 * columns, hidden]
    down: Weight  # [hidden, columns]
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """The routed experts, and the shared one where there is one."""

    num_experts: int
    gate_up: Weight  # [experts, 2 * columns, hidden]
    down: Weight  # [experts, hidden, columns]
    shared: FeedForwardWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer."""

    attention: AttentionWeights
    feed_forward: FeedForwardWeights | ExpertsWeights


@dataclass(frozen=True, slots=True)
class ShardWeights:
    """All that a shard keeps of a model."""

    layers: tuple[LayerWeights, ...]
    head: Weight  # [vocabulary, hidden]


@dataclass(frozen=True, slots=True)
class Fill:
    """A slice and where it goes: matrix m of the slice begins at row `row + m * stride` of the flattened target."""

    part: pb.TensorSlice
    target: Weight
    row: int = 0
    stride: int = 0
    is_norm: bool = False


class Layout:
    """Takes the memory of a plan's weights on a device, and lists what fills it. Vectors are seen as [n, 1]."""

    def __init__(self, plan: pb.ShardPlan, device: torch.device, kernels: Kernels) -> None:
        """Take the memory, uninitialized (biases that are partly absent are zero there)."""
        self._kernels = kernels
        self.fills: list[Fill] = []
        self.num_bytes = 0
        self._plan = plan
        self._device = device
        self._dtype = TORCH_DTYPES[plan.dtype]
        layers = tuple(self._layer(layer) for layer in plan.layers)
        self.weights = ShardWeights(layers, self._weight([plan.head], plan.head_quantization))

    def _layer(self, layer: pb.LayerPlan) -> LayerWeights:
        attention = self._attention(layer.attention)
        if layer.WhichOneof("feed_forward") == "dense":
            return LayerWeights(attention, self._feed_forward(layer.dense))
        part = layer.experts
        shared = self._feed_forward(part.shared) if part.HasField("shared") else None
        gate_up, down = self._matrix(part.gate, part.up), self._matrix(part.down)
        return LayerWeights(attention, ExpertsWeights(part.num_experts, gate_up, down, shared))

    def _attention(self, part: pb.AttentionSlice) -> AttentionWeights:
        qkv, o = self._matrix(part.q, part.k, part.v), self._matrix(part.o)
        heads, kv_heads = length(self._plan.heads), length(self._plan.kv_heads)
        dim = self._plan.attention.head_dim
        biases = [_present(part, field) for field in ("q_bias", "k_bias", "v_bias")]
        qkv_bias = self._vector(biases, [heads * dim, kv_heads * dim, kv_heads * dim])
        o_bias = self._vector([_present(part, "o_bias")], [self._plan.hidden])
        qk_norm = None
        if self._plan.attention.qk_norm == pb.QK_NORM_FULL:
            norm = self._vector([part.q_norm, part.k_norm], [heads * dim, kv_heads * dim], is_norm=True)
            qk_norm = None if norm is None else norm.view(heads + kv_heads, dim)
        elif self._plan.attention.qk_norm == pb.QK_NORM_HEAD:
            # One vector for all heads, repeated, so that q and k are normed in one pass.
            norm = self._vector([part.q_norm] * heads + [part.k_norm] * kv_heads, [dim] * (heads + kv_heads), is_norm=True)
            qk_norm = None if norm is None else norm.view(heads + kv_heads, dim)
        return AttentionWeights(qkv, o, qkv_bias, o_bias, qk_norm)

    def _feed_forward(self, part: pb.FeedForwardSlice) -> FeedForwardWeights:
        columns = length(part.down.ranges[1])
        biases = self._vector([_present(part, "gate_bias"), _present(part, "up_bias")], [columns, columns])
        down_bias = self._vector([_present(part, "down_bias")], [self._plan.hidden])
        return FeedForwardWeights(self._matrix(part.gate, part.up), self._matrix(part.down), biases, down_bias)

    def _matrix(self, *parts: pb.TensorSlice) -> Weight:
        return self._weight(parts, self._plan.quantization)

    def _weight(self, parts: Sequence[pb.TensorSlice], quantization: pb.Quantization) -> Weight:
        """One weight of several slices, one below the other."""
        *experts, _, inputs = selected_shape(parts[0])
        shape = (*experts, sum(selected_shape(part)[-2] for part in parts), inputs)
        weight = self._kernels.empty_weight(shape, quantization, self._dtype, self._device)
        self.num_bytes += weight.nbytes
        row = 0
        for part in parts:
            self.fills.append(Fill(part, weight, row, weight.num_outputs))
            row += selected_shape(part)[-2]
        return weight

    def _vector(
        self, parts: Sequence[pb.TensorSlice | None], sizes: Sequence[int], *, is_norm: bool = False
    ) -> torch.Tensor | None:
        """One vector of several slices, one after the other; none where all are absent."""
        present = [part for part in parts if part is not None]
        if not present:
            return None
        target = DenseWeight(torch.zeros((sum(sizes), 1), dtype=self._dtype, device=self._device))
        self.num_bytes += target.nbytes
        row = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                self.fills.append(Fill(part, target, row, is_norm=is_norm))
            row += size
        return target.tensor.view(-1)


def _present(part: pb.AttentionSlice | pb.FeedForwardSlice, field: str) -> pb.TensorSlice | None:
    found: pb.TensorSlice | None = getattr(part, field) if part.HasField(field) else None
    return found
