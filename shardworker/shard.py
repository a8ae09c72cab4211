"""The arithmetic of a shard: projections, attention, feed-forward blocks and output head over its slices.

Each answer is this shard's addend; the coordinator sums. Nothing here checks a message: `shardworker.session` did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from protos import plan_pb2 as pb
from protos.tensors import TORCH_DTYPES
from shardworker.kernels.interface import DynamicRope, HeadSpec
from shardworker.plan import length
from shardworker.weights import ExpertsWeights, FeedForwardWeights, ShardWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardworker.kernels.interface import Kernels, Span, StepAttention, Weight
    from shardworker.kv import KvPool


PASS_BYTES = 1 << 30
"""What a block or the head may take for what lies between its rows and its answer; more rows than that go in several passes."""


class Routing(NamedTuple):
    """Where the rows of an MoE layer go."""

    chosen: torch.Tensor  # [rows, k], on the CPU
    weights: torch.Tensor  # float32 [rows, k]
    shared: torch.Tensor | None  # float32 [rows]; absent: 1

    def of(self, rows: slice) -> Routing:
        """Give that of some rows."""
        return Routing(self.chosen[rows], self.weights[rows], None if self.shared is None else self.shared[rows])


class Candidates(NamedTuple):
    """The best of this shard's vocabulary."""

    ids: torch.Tensor  # int32 [rows, c], of the whole vocabulary
    logits: torch.Tensor  # float32 [rows, c]
    logsumexp: torch.Tensor  # float64 [rows, 2]: of the logits, and of the logits over the temperature


class Shard:
    """Weights of a plan on a device, and what is computed with them."""

    def __init__(self, plan: pb.ShardPlan, weights: ShardWeights, weights_bytes: int, kernels: Kernels) -> None:
        self.plan = plan
        self.device = device = kernels.device
        self.dtype = TORCH_DTYPES[plan.dtype]
        self.weights_bytes = weights_bytes
        self._weights = weights
        self._kernels = kernels
        self.num_layers = len(plan.layers)
        self.hidden = plan.hidden
        spec = plan.attention
        self.full_norm = spec.qk_norm == pb.QK_NORM_FULL
        self._dim = spec.head_dim
        self._head_spec = _head_spec(plan, self.dtype, device)
        self._heads, self._kv_heads = self._head_spec.num_heads, self._head_spec.num_kv_heads
        self._qk_heads = self._heads + self._kv_heads
        heads, kv_heads = range(plan.heads.start, plan.heads.end), range(plan.kv_heads.start, plan.kv_heads.end)
        # A kv head's squares are counted by the shard that computes its first query head.
        counted = [head * spec.num_heads // spec.num_kv_heads in heads for head in kv_heads]
        self._counts = torch.zeros(self._qk_heads, 2, device=device)
        self._counts[: self._heads, 0] = 1
        self._counts[self._heads :, 1] = torch.tensor(counted, device=device)
        # Which of the two mean squares norms a head, and over how many elements it goes.
        self._norm_index = torch.tensor([0] * self._heads + [1] * self._kv_heads, device=device)
        self._norm_sizes = torch.tensor([spec.num_heads, spec.num_kv_heads], device=device) * float(spec.head_dim)

    def wake(self) -> None:
        """A round begins."""
        self._kernels.wake()

    def rest(self) -> None:
        """A round ends."""
        self._kernels.rest()

    def begin(self, spans: Sequence[Span]) -> StepAttention:
        """Prepare the attention of a step's rows."""
        return self._kernels.begin(self._head_spec, spans, self.plan.page_tokens)

    def project(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> q, k and v, [rows, heads + 2 * kv_heads, head_dim]."""
        weights = self._weights.layers[layer].attention
        return weights.qkv.matmul(hidden, weights.qkv_bias).view(hidden.shape[0], self._qk_heads + self._kv_heads, self._dim)

    def squares(self, qkv: torch.Tensor) -> torch.Tensor:
        """Sums of squares of q and of the k heads that this shard answers for, float32 [rows, 2]."""
        return qkv[:, : self._qk_heads].float().square().sum(-1) @ self._counts

    def attend(
        self, layer: int, qkv: torch.Tensor, squares: torch.Tensor | None, attention: StepAttention, kv: KvPool
    ) -> torch.Tensor:
        """Norm, rotate, remember keys and values, attend, project: [rows, hidden].

        Args:
            layer: of the model.
            qkv: from `project`.
            squares: with norms over all heads, the sums over all shards, float32 [rows, 2].
            attention: of the step.
            kv: of the session.

        """
        weights = self._weights.layers[layer].attention
        if self._heads == 0:
            return weights.o.matmul(qkv.new_zeros(qkv.shape[0], 0), weights.o_bias)
        mean = None if squares is None else (squares / self._norm_sizes).index_select(1, self._norm_index)
        return weights.o.matmul(attention(qkv, weights.qk_norm, mean, *kv.layer(layer)), weights.o_bias)

    def num_experts(self, layer: int) -> int:
        """Routed experts of a layer; 0 in dense ones."""
        weights = self._weights.layers[layer].feed_forward
        return weights.num_experts if isinstance(weights, ExpertsWeights) else 0

    def has_shared_expert(self, layer: int) -> bool:
        """Whether a layer has an expert that sees every row."""
        weights = self._weights.layers[layer].feed_forward
        return isinstance(weights, ExpertsWeights) and weights.shared is not None

    def feed_forward(self, layer: int, hidden: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]; float32 in MoE layers."""
        weights = self._weights.layers[layer].feed_forward
        if isinstance(weights, FeedForwardWeights):
            passes = _passes(hidden.shape[0], _block_bytes(weights.gate_up))
            if len(passes) == 1:
                return self._block(weights, hidden)
            return torch.cat([self._block(weights, hidden[rows]) for rows in passes])
        if routing is None:
            raise TypeError("an MoE layer needs a routing")
        passes = _passes(hidden.shape[0], routing.chosen.shape[1] * _block_bytes(weights.gate_up))
        if len(passes) == 1:
            return self._experts(weights, hidden, routing)
        return torch.cat([self._experts(weights, hidden[rows], routing.of(rows)) for rows in passes])

    def _experts(self, weights: ExpertsWeights, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        out = self._kernels.experts(hidden, routing.chosen, routing.weights, weights.gate_up, weights.down)
        if weights.shared is not None:
            shared = self._block(weights.shared, hidden)
            out.add_(shared if routing.shared is None else shared * routing.shared.to(out.device).unsqueeze(-1))
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> float32 [rows, vocabulary of this shard]."""
        return self._weights.head.matmul(hidden).float()

    def _block(self, weights: FeedForwardWeights, hidden: torch.Tensor) -> torch.Tensor:
        return self._kernels.feed_forward(hidden, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)

    def candidates(self, hidden: torch.Tensor, count: int, temperatures: torch.Tensor) -> Candidates:
        """Pick the best `count` tokens of each row, best first, equal logits by lower id; `temperatures` is float64 [rows]."""
        # Logits in float32, and twice in float64 besides what a sum of them takes.
        passes = _passes(hidden.shape[0], 32 * length(self.plan.vocabulary))
        if len(passes) == 1:
            return self._candidates(hidden, count, temperatures)
        found = [self._candidates(hidden[rows], count, temperatures[rows]) for rows in passes]
        return Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _candidates(self, hidden: torch.Tensor, count: int, temperatures: torch.Tensor) -> Candidates:
        logits = self.logits(hidden)
        wide = logits.double()
        plain = _logsumexp(wide)
        scaled = plain if bool((temperatures == 1).all()) else _logsumexp(wide / temperatures.to(self.device).unsqueeze(-1))
        logsumexp = torch.stack((plain, scaled), -1)
        ids = best(logits, min(count, logits.shape[-1]))
        return Candidates((ids + self.plan.vocabulary.start).int(), logits.gather(-1, ids), logsumexp)


def _passes(num_rows: int, row_bytes: int) -> list[slice]:
    """Cut rows so that what they take at a time is bounded."""
    step = max(1, PASS_BYTES // max(1, row_bytes))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _block_bytes(gate_up: Weight) -> int:
    """What a row takes within a feed-forward block, roughly: itself laid out, gate and up, float32 each."""
    return 4 * (gate_up.num_inputs + gate_up.num_outputs)


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Of each row by itself: torch may add a long row up in another order where there are several. [rows, n] -> [rows]."""
    return torch.stack([row.logsumexp(0) for row in logits])


def best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of each row, largest first, equal ones by lower index: [rows, count]."""
    if count == 0:
        return torch.empty((logits.shape[0], 0), dtype=torch.long, device=logits.device)
    if count == 1:
        return logits.argmax(-1, keepdim=True)  # the first of equal ones
    values, ids = logits.topk(count, -1)
    last = values[:, -1:]
    # Of the values that equal the last one, topk took any.
    unfair = (logits == last).sum(-1) != (values == last).sum(-1)
    for row in unfair.nonzero().flatten().tolist():
        equal = values[row] == last[row]
        lowest = (logits[row] == last[row]).nonzero().flatten()
        ids[row, equal] = lowest[: int(equal.sum())]
    # By id, then, keeping that order among equals, by value.
    ids = ids.sort(-1).values
    order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True).indices
    return ids.gather(-1, order)


def _head_spec(plan: pb.ShardPlan, dtype: torch.dtype, device: torch.device) -> HeadSpec:
    spec, rope = plan.attention, plan.attention.rope
    heads = range(plan.heads.start, plan.heads.end)
    dynamic = rope.dynamic
    return HeadSpec(
        num_heads=len(heads),
        num_kv_heads=length(plan.kv_heads),
        head_dim=spec.head_dim,
        kv_head_of=tuple(head * spec.num_kv_heads // spec.num_heads - plan.kv_heads.start for head in heads),
        scale=spec.scale,
        qk_norm_eps=spec.qk_norm_eps,
        clip_qkv=spec.clip_qkv,
        rotary_dims=rope.rotary_dims,
        inverse_frequencies=torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=device),
        attention_factor=rope.attention_factor,
        dynamic=DynamicRope(dynamic.base, dynamic.factor, dynamic.original_positions) if rope.HasField("dynamic") else None,
        dtype=dtype,
    )
