from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from protos import plan_pb2
from protos.errors import InvalidArgument
from shardworker.plan import check_plan

if TYPE_CHECKING:
    from collections.abc import Callable

CONTRADICTIONS: dict[str, Callable[[Any], Any]] = {
    "shard 2 of 2": lambda p: setattr(p, "shard", 2),
    "dtype 4": lambda p: setattr(p, "dtype", 4),
    "quantization 0": lambda p: setattr(p, "quantization", 0),
    "hidden is 4294967295": lambda p: setattr(p, "hidden", 2**32 - 1),
    "page_tokens is 4294967295": lambda p: setattr(p, "page_tokens", 2**32 - 1),
    "attention of (16777217, 3, 16) heads": lambda p: setattr(p.attention, "num_heads", 2**24 + 1),
    "layer 1 has 4294967295 experts": lambda p: setattr(p.layers[1].experts, "num_experts", 2**32 - 1),
    "4098 layers, wanted 1 to 4096": lambda p: p.layers.extend([p.layers[0]] * 4096),
    "no size may be over 16777216": lambda p: p.head.CopyFrom(
        plan_pb2.TensorSlice(name="x", shape=[2**32 - 1], ranges=[plan_pb2.Range(end=2**32 - 1)])
    ),
    "hidden is 0": lambda p: setattr(p, "hidden", 0),
    "page_tokens is 0": lambda p: setattr(p, "page_tokens", 0),
    "0 layers": lambda p: p.ClearField("layers"),
    "attention of (0, 0, 0) heads": lambda p: p.ClearField("attention"),
    "4 kv heads do not divide 6": lambda p: setattr(p.attention, "num_kv_heads", 4),
    "attention scale nan": lambda p: setattr(p.attention, "scale", float("nan")),
    "qk_norm 0": lambda p: setattr(p.attention, "qk_norm", 0),
    "qk_norm_eps 0": lambda p: setattr(p.attention, "qk_norm_eps", 0),
    "clip_qkv -1": lambda p: setattr(p.attention, "clip_qkv", -1),
    "rotary_dims 7": lambda p: setattr(p.attention.rope, "rotary_dims", 7),
    "4 frequencies for rotary_dims 16": lambda p: setattr(p.attention.rope, "rotary_dims", 16),
    "frequency is not finite": lambda p: p.attention.rope.inverse_frequencies.__setitem__(0, float("inf")),
    "attention_factor 0": lambda p: setattr(p.attention.rope, "attention_factor", 0),
    "dynamic rope": lambda p: p.attention.rope.dynamic.CopyFrom(plan_pb2.DynamicNtk(base=1, factor=2, original_positions=4)),
    "heads 5..3": lambda p: p.heads.CopyFrom(plan_pb2.Range(start=5, end=3)),
    "heads 3..6 need kv heads 1..3": lambda p: setattr(p.kv_heads, "start", 2),
    "layer 0 attention q": lambda p: setattr(p.layers[0].attention.q.ranges[0], "start", 1),
    "layer 1 attention q_norm": lambda p: p.layers[1].attention.ClearField("q_norm"),
    "layer 1 has no feed-forward": lambda p: p.layers[1].ClearField("experts"),
    "layer 1 has 0 experts": lambda p: setattr(p.layers[1].experts, "num_experts", 0),
    "layer 1 expert up": lambda p: setattr(p.layers[1].experts.up, "num_experts", 3),
    "num_experts 0": lambda p: setattr(p.layers[1].experts.gate, "num_experts", 0),
    "layer 1 expert gate: dimensions": lambda p: p.layers[1].experts.gate.ranges.pop(),
    "layer 1 shared expert down": lambda p: p.layers[1].experts.shared.down.ClearField("shape"),
    "layer 0 gate_bias": lambda p: p.layers[0].dense.gate_bias.ranges.pop(),
    "not the vocabulary range": lambda p: p.vocabulary.CopyFrom(plan_pb2.Range(start=0, end=25)),
    "head: no tensor name": lambda p: setattr(p.head, "name", ""),
    "rows 25..50 of 49": lambda p: p.head.shape.__setitem__(0, 49),
    "0 files with random_weights False": lambda p: p.ClearField("files"),
    "2 files with random_weights True": lambda p: setattr(p, "random_weights", True),
    "stands twice": lambda p: p.files.append(p.files[0]),
    "'../x' is no plain name": lambda p: setattr(p.files[0], "name", "../x"),
    "fingerprint has 3 bytes": lambda p: setattr(p.files[0], "fingerprint", b"abc"),
}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_a_sound_plan_passes(tiny: Any, num_shards: int) -> None:
    for shard in range(num_shards):
        check_plan(tiny.plan(shard, num_shards))


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_a_contradiction_is_named(tiny: Any, text: str) -> None:
    plan = tiny.plan(1, 2)
    CONTRADICTIONS[text](plan)
    with pytest.raises(InvalidArgument) as raised:
        check_plan(plan)
    assert text in str(raised.value)


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="the plan contradicts itself"):
        check_plan(plan_pb2.ShardPlan())
