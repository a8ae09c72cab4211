"""What a shard takes on its worker, in bytes: the same sums that the worker's loader makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coordinator.planning.slicing import GROUP
from protos.errors import InvalidArgument
from protos.plan_pb2 import QK_NORM_HEAD, QUANTIZATION_INT4, QUANTIZATION_INT8, AttentionSlice, FeedForwardSlice, LayerPlan
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coordinator.planning.slicing import Span
    from protos.plan_pb2 import Quantization, Range, ShardPlan, TensorSlice

ITEM_BYTES = {DTYPE_F32: 4, DTYPE_BF16: 2, DTYPE_F16: 2}
"""By the dtypes that a plan may have."""

GROUP_BYTES = {QUANTIZATION_INT8: GROUP + 2, QUANTIZATION_INT4: GROUP // 2 + 2}
"""Of 32 weights of one row: their values and one float16 scale. A row's last group is filled up with zeros."""

_MATRICES = ("q", "k", "v", "o")
_FEED_FORWARD_MATRICES = ("gate", "up", "down")
_QKV_BIASES = ("q_bias", "k_bias", "v_bias")


def weight_bytes(plan: ShardPlan) -> int:
    """Count the bytes of a shard's weights: matrices and head as quantized, biases and norms in the plan's dtype."""
    item = ITEM_BYTES[plan.dtype]
    matrices = sum(_matrix_bytes(plan, part, plan.quantization) for layer in plan.layers for part in _matrices(layer))
    vectors = sum(_attention_vector_elements(plan, layer.attention) for layer in plan.layers)
    vectors += sum(_bias_elements(block) for layer in plan.layers for block in _blocks(layer))
    return matrices + vectors * item + _matrix_bytes(plan, plan.head, plan.head_quantization)


def decode_bytes(plan: ShardPlan, active_experts: Sequence[int], context_tokens: float) -> float:
    """Count the bytes that a shard has to read for one decoded token: all weights but the idle experts', and the KV cache.

    Args:
        plan: of the shard.
        active_experts: routed experts that the token goes to, one number for each layer; 0 in dense layers.
        context_tokens: tokens whose keys and values are read.

    Raises:
        InvalidArgument: not one number for each layer, or not within the layer's experts.

    """
    if len(active_experts) != len(plan.layers):
        raise InvalidArgument(f"wanted the active experts of {len(plan.layers)} layers, found {len(active_experts)} numbers")
    idle = sum(_idle_bytes(plan, layer, active) for layer, active in zip(plan.layers, active_experts, strict=True))
    return weight_bytes(plan) - idle + kv_bytes_per_token(plan) * context_tokens


def kv_bytes_per_token(plan: ShardPlan) -> int:
    """Count the bytes of keys and values that a token takes on a shard."""
    kv_heads = _length(plan.kv_heads)
    return 2 * kv_heads * plan.attention.head_dim * len(plan.layers) * ITEM_BYTES[plan.dtype]


def column_ranges(plan: ShardPlan) -> dict[str, Span]:
    """Tell which columns of the feed-forward blocks a shard has: "expert", "shared" and "dense", those that there are."""
    found: dict[str, Span] = {}
    for layer in plan.layers:
        if layer.HasField("dense"):
            found.setdefault("dense", _columns(layer.dense.down))
        else:
            found.setdefault("expert", _columns(layer.experts.down))
            if layer.experts.HasField("shared"):
                found.setdefault("shared", _columns(layer.experts.shared.down))
    return dict(sorted(found.items(), key=lambda item: ("expert", "shared", "dense").index(item[0])))


def _columns(down: TensorSlice) -> Span:
    return down.ranges[-1].start, down.ranges[-1].end


def _matrix_bytes(plan: ShardPlan, part: TensorSlice, quantization: Quantization) -> int:
    if quantization not in GROUP_BYTES:
        return _elements(part) * ITEM_BYTES[plan.dtype]
    columns = _length(part.ranges[-1])
    return _elements(part) // columns * -(-columns // GROUP) * GROUP_BYTES[quantization]


def _idle_bytes(plan: ShardPlan, layer: LayerPlan, active: int) -> int:
    """Bytes of the routed experts that a token does not go to."""
    num_experts = layer.experts.num_experts if layer.HasField("experts") else 0
    if not 0 <= active <= num_experts:
        raise InvalidArgument(f"a layer of {num_experts} experts cannot have {active} active ones")
    if not num_experts:
        return 0
    stacked = sum(_matrix_bytes(plan, getattr(layer.experts, name), plan.quantization) for name in _FEED_FORWARD_MATRICES)
    return stacked // num_experts * (num_experts - active)


def _matrices(layer: LayerPlan) -> Iterator[TensorSlice]:
    yield from (getattr(layer.attention, name) for name in _MATRICES)
    for block in _blocks(layer):
        yield from (getattr(block, name) for name in _FEED_FORWARD_MATRICES)
    if layer.HasField("experts"):
        yield from (getattr(layer.experts, name) for name in _FEED_FORWARD_MATRICES)


def _blocks(layer: LayerPlan) -> Iterator[FeedForwardSlice]:
    if layer.HasField("dense"):
        yield layer.dense
    elif layer.experts.HasField("shared"):
        yield layer.experts.shared


def _attention_vector_elements(plan: ShardPlan, part: AttentionSlice) -> int:
    count = sum(_elements(getattr(part, name)) for name in (*_QKV_BIASES, "o_bias") if part.HasField(name))
    if plan.attention.qk_norm == QK_NORM_HEAD:
        # The worker repeats the vector for each of its heads, to norm them in one pass.
        return count + (_length(plan.heads) + _length(plan.kv_heads)) * plan.attention.head_dim
    return count + sum(_elements(getattr(part, name)) for name in ("q_norm", "k_norm") if part.HasField(name))


def _bias_elements(block: FeedForwardSlice) -> int:
    return sum(_elements(getattr(block, name)) for name in ("gate_bias", "up_bias", "down_bias") if block.HasField(name))


def _elements(part: TensorSlice) -> int:
    return math.prod(_length(extent) for extent in part.ranges) * max(1, part.num_experts)


def _length(extent: Range) -> int:
    return extent.end - extent.start
