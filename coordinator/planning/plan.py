"""From a model and a number of shards to one `ShardPlan` each, and what they cost.

Slices go along the rules of `coordinator.planning.slicing`: q, k, v, gate, up and the head by rows, o and down by columns,
biases with their rows; a bias of o or down, which is added to a sum of partials, goes to shard 0 alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.models.layout import check_tensors, has_own_head, match_layout
from coordinator.models.spec import DenseSpec, MoeSpec, Role
from coordinator.planning.sizes import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from coordinator.planning.slicing import cut_columns, cut_heads, cut_vocabulary
from protos import plan_pb2 as pb
from protos.digest import mesh_digest, shard_digest
from protos.errors import InvalidArgument
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DType

if TYPE_CHECKING:
    from coordinator.models.checkpoint import Checkpoint
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec
    from coordinator.planning.slicing import HeadCut, Span

PAGE_TOKENS = 16
"""Tokens of one KV page, unless told otherwise."""

_STORED_DTYPES = {"F32": DTYPE_F32, "BF16": DTYPE_BF16, "F16": DTYPE_F16}
_CONFIG_DTYPES = {"float32": DTYPE_F32, "bfloat16": DTYPE_BF16, "float16": DTYPE_F16}


HEAD_QUANTIZATION = {
    pb.QUANTIZATION_NONE: pb.QUANTIZATION_NONE,
    pb.QUANTIZATION_INT8: pb.QUANTIZATION_INT8,
    # Every token's chance comes from the head: 4 bits lose more there than anywhere (llama.cpp keeps 6 in its Q4_0 files).
    pb.QUANTIZATION_INT4: pb.QUANTIZATION_INT8,
}
"""Of the output head, by that of the layers' matrices."""


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """The plans of all shards of a mesh. Tuples are in shard order."""

    shards: tuple[pb.ShardPlan, ...]
    shard_digests: tuple[bytes, ...]
    digest: bytes
    """Names the mesh: `protos.digest.mesh_digest`."""
    weight_bytes: tuple[int, ...]
    """Of each shard's weights as the worker holds them."""
    kv_bytes_per_token: tuple[int, ...]
    """Of each shard's keys and values."""


def plan_mesh(
    spec: ModelSpec,
    checkpoint: Checkpoint | None,
    num_shards: int,
    *,
    dtype: DType,
    quantization: pb.Quantization,
    page_tokens: int = PAGE_TOKENS,
) -> MeshPlan:
    """Cut a model.

    Args:
        spec: the model.
        checkpoint: where its weights are; None for random ones, under the names that they would have.
        num_shards: at least 1, at most `coordinator.planning.slicing.most_shards`.
        dtype: of arithmetic, weights and KV cache: F32, BF16 or F16.
        quantization: of the matrices.
        page_tokens: tokens of one KV page.

    Raises:
        TopologyError: the model cannot be cut like this.
        ModelError: the checkpoint lacks a tensor, or one has another shape or dtype.
        InvalidArgument: a dtype or quantization that no plan may have, a page without tokens.

    """
    if dtype not in ITEM_BYTES or quantization not in HEAD_QUANTIZATION or page_tokens < 1:
        raise InvalidArgument("a plan needs the dtype F32, BF16 or F16, a quantization, and pages of at least 1 token")
    cutter = _Cutter.of(spec if checkpoint is None else match_layout(spec, checkpoint.tensors), checkpoint, num_shards)
    if checkpoint is not None:
        check_tensors(cutter.spec, checkpoint)
    shards = tuple(
        pb.ShardPlan(
            shard=shard,
            num_shards=num_shards,
            dtype=dtype,
            quantization=quantization,
            head_quantization=HEAD_QUANTIZATION[quantization],
            hidden=spec.hidden,
            attention=spec.attention,
            heads=_range(cutter.heads[shard].heads),
            kv_heads=_range(cutter.heads[shard].kv_heads),
            layers=[cutter.layer(shard, layer) for layer in range(spec.num_layers)],
            head=cutter.head(shard),
            vocabulary=_range(cutter.vocabulary[shard]),
            files=checkpoint.files if checkpoint else (),
            page_tokens=page_tokens,
            random_weights=checkpoint is None,
        )
        for shard in range(num_shards)
    )
    digests = tuple(shard_digest(shard) for shard in shards)
    return MeshPlan(
        shards=shards,
        shard_digests=digests,
        digest=mesh_digest(digests),
        weight_bytes=tuple(weight_bytes(shard) for shard in shards),
        kv_bytes_per_token=tuple(kv_bytes_per_token(shard) for shard in shards),
    )


def default_dtype(config: Config, checkpoint: Checkpoint | None) -> DType:
    """Find the model's own dtype: that of most of its bytes, or, without weights, the one that config.json names (else BF16)."""
    if checkpoint is None:
        return _CONFIG_DTYPES.get((config.dtype or "").removeprefix("torch."), DTYPE_BF16)
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.dtype in _STORED_DTYPES:
            sizes[entry.dtype] += entry.num_bytes
    return _STORED_DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else DTYPE_BF16


@dataclass(frozen=True, slots=True)
class _Cutter:
    """All cuts of a model; makes the slices of one shard."""

    spec: ModelSpec
    own_head: bool
    heads: tuple[HeadCut, ...]
    vocabulary: tuple[Span, ...]
    columns: dict[int, tuple[Span, ...]]
    """By width."""

    @classmethod
    def of(cls, spec: ModelSpec, checkpoint: Checkpoint | None, num_shards: int) -> _Cutter:
        """Make all cuts, in the order in which a person looks for the reason: attention, columns, vocabulary."""
        heads = cut_heads(spec.attention.num_heads, spec.attention.num_kv_heads, num_shards)
        columns: dict[int, tuple[Span, ...]] = {}
        for block in dict.fromkeys(spec.feed_forward):
            if isinstance(block, DenseSpec):
                columns[block.width] = cut_columns(block.width, num_shards, "a dense block")
            else:
                columns[block.width] = cut_columns(block.width, num_shards, "an expert")
                if block.shared_width:
                    columns[block.shared_width] = cut_columns(block.shared_width, num_shards, "a shared expert")
        own_head = has_own_head(spec, checkpoint.tensors if checkpoint else None)
        return cls(spec, own_head, heads, cut_vocabulary(spec.vocabulary, num_shards), columns)

    def head(self, shard: int) -> pb.TensorSlice:
        name = self.spec.name(Role.HEAD if self.own_head else Role.EMBEDDING)
        return _rows(name, (self.spec.vocabulary, self.spec.hidden), self.vocabulary[shard])

    def layer(self, shard: int, layer: int) -> pb.LayerPlan:
        block = self.spec.feed_forward[layer]
        attention = self._attention(shard, layer)
        if isinstance(block, DenseSpec):
            return pb.LayerPlan(attention=attention, dense=self._dense(shard, layer, block.width))
        return pb.LayerPlan(attention=attention, experts=self._experts(shard, layer, block))

    def _attention(self, shard: int, layer: int) -> pb.AttentionSlice:
        spec, attention = self.spec, self.spec.attention
        dim = attention.head_dim
        queries, keys = attention.num_heads * dim, attention.num_kv_heads * dim
        own, own_kv = (_scaled(span, dim) for span in (self.heads[shard].heads, self.heads[shard].kv_heads))
        part = pb.AttentionSlice(
            q=_rows(spec.name(Role.Q, layer), (queries, spec.hidden), own),
            k=_rows(spec.name(Role.K, layer), (keys, spec.hidden), own_kv),
            v=_rows(spec.name(Role.V, layer), (keys, spec.hidden), own_kv),
            o=_columns(spec.name(Role.O, layer), (spec.hidden, queries), own),
        )
        full = attention.qk_norm == pb.QK_NORM_FULL
        vectors = (
            (Role.Q_BIAS, part.q_bias, queries, own),
            (Role.K_BIAS, part.k_bias, keys, own_kv),
            (Role.V_BIAS, part.v_bias, keys, own_kv),
            (Role.O_BIAS, part.o_bias, spec.hidden, (0, spec.hidden) if shard == 0 else None),
            (Role.Q_NORM, part.q_norm, queries if full else dim, own if full else (0, dim)),
            (Role.K_NORM, part.k_norm, keys if full else dim, own_kv if full else (0, dim)),
        )
        self._fill(layer, vectors)
        return part

    def _dense(self, shard: int, layer: int, width: int) -> pb.FeedForwardSlice:
        part = self._block(shard, layer, width, (Role.GATE, Role.UP, Role.DOWN))
        own, hidden = self.columns[width][shard], self.spec.hidden
        vectors = (
            (Role.GATE_BIAS, part.gate_bias, width, own),
            (Role.UP_BIAS, part.up_bias, width, own),
            (Role.DOWN_BIAS, part.down_bias, hidden, (0, hidden) if shard == 0 else None),
        )
        self._fill(layer, vectors)
        return part

    def _block(self, shard: int, layer: int, width: int, roles: tuple[Role, Role, Role]) -> pb.FeedForwardSlice:
        gate, up, down = (self.spec.name(role, layer) for role in roles)
        own, hidden = self.columns[width][shard], self.spec.hidden
        return pb.FeedForwardSlice(
            gate=_rows(gate, (width, hidden), own), up=_rows(up, (width, hidden), own), down=_columns(down, (hidden, width), own)
        )

    def _experts(self, shard: int, layer: int, block: MoeSpec) -> pb.ExpertsSlice:
        fused = Role.FUSED_GATE_UP in self.spec.names
        part = self._fused_experts(shard, layer, block) if fused else self._single_experts(shard, layer, block)
        if block.shared_width:
            roles = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
            part.shared.CopyFrom(self._block(shard, layer, block.shared_width, roles))
        return part

    def _single_experts(self, shard: int, layer: int, block: MoeSpec) -> pb.ExpertsSlice:
        """One tensor for each expert and matrix."""
        experts = block.gate.num_experts
        one = self._block(shard, layer, block.width, (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN))
        for part in (one.gate, one.up, one.down):
            part.num_experts = experts
        return pb.ExpertsSlice(num_experts=experts, gate=one.gate, up=one.up, down=one.down)

    def _fused_experts(self, shard: int, layer: int, block: MoeSpec) -> pb.ExpertsSlice:
        """All experts in two tensors, gate's rows before up's."""
        experts, width, hidden = block.gate.num_experts, block.width, self.spec.hidden
        start, end = self.columns[width][shard]
        gate_up, down = self.spec.name(Role.FUSED_GATE_UP, layer), self.spec.name(Role.FUSED_DOWN, layer)
        shape = (experts, 2 * width, hidden)
        return pb.ExpertsSlice(
            num_experts=experts,
            gate=_slice(gate_up, shape, ((0, experts), (start, end), (0, hidden))),
            up=_slice(gate_up, shape, ((0, experts), (width + start, width + end), (0, hidden))),
            down=_slice(down, (experts, hidden, width), ((0, experts), (0, hidden), (start, end))),
        )

    def _fill(self, layer: int, vectors: tuple[tuple[Role, pb.TensorSlice, int, Span | None], ...]) -> None:
        """Write those vectors that the model has and the shard gets."""
        for role, target, size, span in vectors:
            if role in self.spec.names and span is not None:
                target.CopyFrom(_slice(self.spec.name(role, layer), (size,), (span,)))


def _rows(name: str, shape: tuple[int, int], rows: Span) -> pb.TensorSlice:
    return _slice(name, shape, (rows, (0, shape[1])))


def _columns(name: str, shape: tuple[int, int], columns: Span) -> pb.TensorSlice:
    return _slice(name, shape, ((0, shape[0]), columns))


def _slice(name: str, shape: tuple[int, ...], spans: tuple[Span, ...]) -> pb.TensorSlice:
    return pb.TensorSlice(name=name, shape=shape, ranges=[_range(span) for span in spans])


def _range(span: Span) -> pb.Range:
    return pb.Range(start=span[0], end=span[1])


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor
