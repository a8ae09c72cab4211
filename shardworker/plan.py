"""Whether a plan agrees with itself: checked before anything is dropped, allocated or read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from protos import plan_pb2 as pb
from protos import tensor_pb2
from protos.digest import DIGEST_BYTES
from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DIMENSIONS = 3
MAX_SIZE = 2**24
"""Largest count of anything in a plan, as in a config: kernels count in 32 bits, and lists of heads are made."""
MAX_LAYERS = 4096
_DTYPES = (tensor_pb2.DTYPE_F32, tensor_pb2.DTYPE_BF16, tensor_pb2.DTYPE_F16)
_QUANTIZATIONS = (pb.QUANTIZATION_NONE, pb.QUANTIZATION_INT8, pb.QUANTIZATION_INT4)


def require(condition: bool, text: str) -> None:  # noqa: FBT001  # reads as a sentence
    """Refuse a plan.

    Raises:
        InvalidArgument: the condition does not hold.

    """
    if not condition:
        raise InvalidArgument(f"the plan contradicts itself: {text}")


def length(extent: pb.Range) -> int:
    """Indices in a half-open range."""
    return extent.end - extent.start


def selected_shape(part: pb.TensorSlice) -> tuple[int, ...]:
    """Shape of a slice as it is kept: with the experts in front, where they are stacked."""
    lengths = tuple(length(extent) for extent in part.ranges)
    return (part.num_experts, *lengths) if part.num_experts else lengths


def check_plan(plan: pb.ShardPlan) -> None:
    """Check every number of a plan against the others.

    Raises:
        InvalidArgument: names what contradicts what.

    """
    require(plan.shard < plan.num_shards, f"shard {plan.shard} of {plan.num_shards}")
    require(plan.dtype in _DTYPES, f"dtype {plan.dtype} is not F32, BF16 or F16")
    for quantization in (plan.quantization, plan.head_quantization):
        require(quantization in _QUANTIZATIONS, f"quantization {quantization} is unknown")
    require(0 < plan.hidden <= MAX_SIZE, f"hidden is {plan.hidden}")
    require(0 < plan.page_tokens <= MAX_SIZE, f"page_tokens is {plan.page_tokens}")
    require(0 < len(plan.layers) <= MAX_LAYERS, f"{len(plan.layers)} layers, wanted 1 to {MAX_LAYERS}")
    _check_attention_spec(plan.attention)
    _check_heads(plan)
    for number, layer in enumerate(plan.layers):
        _check_attention(plan, layer.attention, f"layer {number} attention")
        _check_block(plan, layer, f"layer {number}")
    _check_slice(plan.head, (length(plan.vocabulary), plan.hidden), "head")
    require(plan.head.ranges[0] == plan.vocabulary, "the head's rows are not the vocabulary range")
    require(bool(plan.files) != plan.random_weights, f"{len(plan.files)} files with random_weights {plan.random_weights}")
    check_files(plan.files)


def _check_attention_spec(spec: pb.AttentionSpec) -> None:
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    require(all(0 < size <= MAX_SIZE for size in sizes), f"attention of {sizes} heads, kv heads and head_dim")
    require(spec.num_heads % spec.num_kv_heads == 0, f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
    require(math.isfinite(spec.scale) and spec.scale > 0, f"attention scale {spec.scale}")
    require(spec.qk_norm in {pb.QK_NORM_NONE, pb.QK_NORM_HEAD, pb.QK_NORM_FULL}, f"qk_norm {spec.qk_norm} is unknown")
    if spec.qk_norm != pb.QK_NORM_NONE:
        require(math.isfinite(spec.qk_norm_eps) and spec.qk_norm_eps > 0, f"qk_norm_eps {spec.qk_norm_eps}")
    require(math.isfinite(spec.clip_qkv) and spec.clip_qkv >= 0, f"clip_qkv {spec.clip_qkv}")
    rope = spec.rope
    dims = rope.rotary_dims
    require(dims % 2 == 0 and dims <= spec.head_dim, f"rotary_dims {dims} with head_dim {spec.head_dim}")
    require(len(rope.inverse_frequencies) == dims // 2, f"{len(rope.inverse_frequencies)} frequencies for rotary_dims {dims}")
    require(all(map(math.isfinite, rope.inverse_frequencies)), "a frequency is not finite")
    require(
        dims == 0 or (math.isfinite(rope.attention_factor) and rope.attention_factor > 0),
        f"attention_factor {rope.attention_factor}",
    )
    if rope.HasField("dynamic"):
        dynamic = rope.dynamic
        sound = math.isfinite(dynamic.base) and math.isfinite(dynamic.factor) and dynamic.base > 1 and dynamic.factor > 1
        require(sound and dynamic.original_positions > 0 and dims > 2, "dynamic rope out of range")  # noqa: PLR2004


def _check_heads(plan: pb.ShardPlan) -> None:
    spec, heads, kv_heads = plan.attention, plan.heads, plan.kv_heads
    require(heads.start <= heads.end <= spec.num_heads, f"heads {heads.start}..{heads.end} of {spec.num_heads}")
    require(
        kv_heads.start <= kv_heads.end <= spec.num_kv_heads, f"kv heads {kv_heads.start}..{kv_heads.end} of {spec.num_kv_heads}"
    )
    if heads.start < heads.end:
        first, last = (head * spec.num_kv_heads // spec.num_heads for head in (heads.start, heads.end - 1))
        covered = kv_heads.start <= first and last < kv_heads.end
        found = f"found {kv_heads.start}..{kv_heads.end}"
        require(covered, f"heads {heads.start}..{heads.end} need kv heads {first}..{last + 1}, {found}")


def _check_attention(plan: pb.ShardPlan, part: pb.AttentionSlice, where: str) -> None:
    spec = plan.attention
    queries, keys = length(plan.heads) * spec.head_dim, length(plan.kv_heads) * spec.head_dim
    _check_slice(part.q, (queries, plan.hidden), f"{where} q")
    _check_slice(part.k, (keys, plan.hidden), f"{where} k")
    _check_slice(part.v, (keys, plan.hidden), f"{where} v")
    _check_slice(part.o, (plan.hidden, queries), f"{where} o")
    for field, size in (("q_bias", queries), ("k_bias", keys), ("v_bias", keys), ("o_bias", plan.hidden)):
        if part.HasField(field):
            _check_slice(getattr(part, field), (size,), f"{where} {field}")
    for field, size in (("q_norm", queries), ("k_norm", keys)):
        require(part.HasField(field) == (spec.qk_norm != pb.QK_NORM_NONE), f"{where} {field} against qk_norm {spec.qk_norm}")
        if part.HasField(field):
            shape = (spec.head_dim,) if spec.qk_norm == pb.QK_NORM_HEAD else (size,)
            _check_slice(getattr(part, field), shape, f"{where} {field}")


def _check_block(plan: pb.ShardPlan, layer: pb.LayerPlan, where: str) -> None:
    kind = layer.WhichOneof("feed_forward")
    require(kind is not None, f"{where} has no feed-forward block")
    if kind == "dense":
        _check_feed_forward(plan, layer.dense, where)
        return
    part = layer.experts
    require(0 < part.num_experts <= MAX_SIZE, f"{where} has {part.num_experts} experts")
    columns = _columns(part.down)
    _check_slice(part.gate, (part.num_experts, columns, plan.hidden), f"{where} expert gate")
    _check_slice(part.up, (part.num_experts, columns, plan.hidden), f"{where} expert up")
    _check_slice(part.down, (part.num_experts, plan.hidden, columns), f"{where} expert down")
    if part.HasField("shared"):
        _check_feed_forward(plan, part.shared, f"{where} shared expert")


def _check_feed_forward(plan: pb.ShardPlan, part: pb.FeedForwardSlice, where: str) -> None:
    columns = _columns(part.down)
    _check_slice(part.gate, (columns, plan.hidden), f"{where} gate")
    _check_slice(part.up, (columns, plan.hidden), f"{where} up")
    _check_slice(part.down, (plan.hidden, columns), f"{where} down")
    for field, size in (("gate_bias", columns), ("up_bias", columns), ("down_bias", plan.hidden)):
        if part.HasField(field):
            _check_slice(getattr(part, field), (size,), f"{where} {field}")


def _columns(down: pb.TensorSlice) -> int:
    return length(down.ranges[-1]) if down.ranges else 0


def _check_slice(part: pb.TensorSlice, shape: Sequence[int], where: str) -> None:
    require(bool(part.name), f"{where}: no tensor name")
    require(1 <= len(part.shape) <= MAX_DIMENSIONS and len(part.ranges) == len(part.shape), f"{where}: dimensions of {part.name}")
    for extent, size in zip(part.ranges, part.shape, strict=True):
        require(extent.start <= extent.end <= size, f"{where}: {part.name} rows {extent.start}..{extent.end} of {size}")
    require(("{expert}" in part.name) == (part.num_experts > 0), f"{where}: {part.name} with num_experts {part.num_experts}")
    found = selected_shape(part)
    require(max(found) <= MAX_SIZE, f"{where}: {part.name} gives {list(found)}, no size may be over {MAX_SIZE}")
    require(found == tuple(shape), f"{where}: {part.name} gives {list(found)}, wanted {list(shape)}")


def check_files(files: Sequence[pb.CheckpointFile]) -> None:
    """Check what a coordinator says of a checkpoint's files.

    Raises:
        InvalidArgument: a name that is no plain one or stands twice, or a fingerprint that is none.

    """
    names = [file.name for file in files]
    require(len(set(names)) == len(names), "a file stands twice")
    for file in files:
        plain = bool(file.name) and file.name not in {".", ".."} and not set(file.name) & {"/", "\\", "\0"}
        require(plain, f"file name {file.name!r} is no plain name")
        require(len(file.fingerprint) == DIGEST_BYTES, f"file {file.name}: its fingerprint has {len(file.fingerprint)} bytes")
