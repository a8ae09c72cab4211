"""Bytes that a decoded token has to read of a shard."""

from __future__ import annotations

import pytest

from coordinator.planning.sizes import decode_bytes, kv_bytes_per_token, weight_bytes
from protos import plan_pb2 as pb
from protos.errors import InvalidArgument
from protos.tensor_pb2 import DTYPE_BF16

HIDDEN, WIDTH, EXPERTS, VOCABULARY = 64, 32, 6, 10


def part(*shape: int, num_experts: int = 0) -> pb.TensorSlice:
    ranges = [pb.Range(start=0, end=size) for size in shape]
    return pb.TensorSlice(name="t", shape=shape, ranges=ranges, num_experts=num_experts)


def block() -> pb.FeedForwardSlice:
    return pb.FeedForwardSlice(gate=part(WIDTH, HIDDEN), up=part(WIDTH, HIDDEN), down=part(HIDDEN, WIDTH))


def experts(*, stacked: bool, shared: bool = False) -> pb.ExpertsSlice:
    """One tensor for each expert, or all of them in one."""
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    gate, up, down = (part(EXPERTS, *shape) if stacked else part(*shape, num_experts=EXPERTS) for shape in shapes)
    return pb.ExpertsSlice(num_experts=EXPERTS, gate=gate, up=up, down=down, shared=block() if shared else None)


def plan(*layers: pb.LayerPlan, quantization: pb.Quantization = pb.QUANTIZATION_NONE) -> pb.ShardPlan:
    attention = pb.AttentionSlice(q=part(32, HIDDEN), k=part(32, HIDDEN), v=part(32, HIDDEN), o=part(HIDDEN, 32))
    for layer in layers:
        layer.attention.CopyFrom(attention)
    return pb.ShardPlan(
        dtype=DTYPE_BF16,
        quantization=quantization,
        head_quantization=pb.QUANTIZATION_NONE,
        hidden=HIDDEN,
        attention=pb.AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=32, qk_norm=pb.QK_NORM_NONE),
        heads=pb.Range(start=0, end=1),
        kv_heads=pb.Range(start=0, end=1),
        layers=layers,
        head=part(VOCABULARY, HIDDEN),
    )


ATTENTION = 4 * 32 * HIDDEN * 2
BLOCK = 3 * WIDTH * HIDDEN * 2
HEAD = VOCABULARY * HIDDEN * 2


def test_dense_layers_are_read_whole() -> None:
    dense = plan(pb.LayerPlan(dense=block()), pb.LayerPlan(dense=block()))
    assert decode_bytes(dense, [0, 0], 0) == weight_bytes(dense) == 2 * (ATTENTION + BLOCK) + HEAD


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("active", [0, 2, EXPERTS])
def test_only_active_experts_are_read(active: int, *, stacked: bool) -> None:
    moe = plan(pb.LayerPlan(experts=experts(stacked=stacked)))
    assert decode_bytes(moe, [active], 0) == ATTENTION + active * BLOCK + HEAD


def test_shared_expert_is_always_read() -> None:
    mixed = plan(pb.LayerPlan(dense=block()), pb.LayerPlan(experts=experts(stacked=False, shared=True)))
    assert decode_bytes(mixed, [0, 2], 0) == 2 * ATTENTION + BLOCK + 3 * BLOCK + HEAD


def test_quantized_experts_take_less() -> None:
    layers = [pb.LayerPlan(experts=experts(stacked=False))]
    one, two = (decode_bytes(plan(*layers, quantization=pb.QUANTIZATION_INT4), [active], 0) for active in (1, 2))
    assert two - one == BLOCK / 2 * 18 / 32


def test_keys_and_values_of_the_context_are_read_too() -> None:
    dense = plan(pb.LayerPlan(dense=block()))
    assert decode_bytes(dense, [0], 10.5) - decode_bytes(dense, [0], 0) == 10.5 * kv_bytes_per_token(dense) == 10.5 * 128


@pytest.mark.parametrize("active", [[], [1, 1], [-1], [EXPERTS + 1]])
def test_impossible_numbers_of_experts_are_refused(active: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="active"):
        decode_bytes(plan(pb.LayerPlan(experts=experts(stacked=False))), active, 0)
