"""The arithmetic in torch operators: for every device, and what the compiled kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8
from shardworker.kernels.attention import HeadGroup, attention, causal_mask, head_groups
from shardworker.kernels.experts import experts, feed_forward
from shardworker.kernels.linear import DenseWeight, GroupedWeight
from shardworker.kernels.norm import rms_norm
from shardworker.kernels.quantize import INT4_BITS, INT8_BITS
from shardworker.kernels.rope import Rotation, rotate, span_rotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import Quantization
    from shardworker.kernels.interface import HeadSpec, Span, StepAttention, Weight

BITS = {QUANTIZATION_INT8: INT8_BITS, QUANTIZATION_INT4: INT4_BITS}


class PlainKernels:
    """Torch operators; products of several rows may round otherwise than those of one."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wake(self) -> None:
        """Nothing to do: torch wakes its own threads."""

    def rest(self) -> None:
        """Nothing to do."""

    def empty_weight(
        self, shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype, device: torch.device
    ) -> Weight:
        """Take the memory of a weight."""
        if bits := BITS.get(quantization):
            return GroupedWeight.empty(shape, bits, dtype, device)
        return DenseWeight.empty(shape, dtype, device)

    def begin(self, heads: HeadSpec, spans: Sequence[Span], page_tokens: int) -> StepAttention:
        """Prepare the attention of a step."""
        device = heads.inverse_frequencies.device
        slots = [_slot(span, i, page_tokens) for span in spans for i in range(span.position, _end(span))]
        return PlainStepAttention(
            heads=heads,
            groups=head_groups(heads.kv_head_of),
            spans=tuple(_prepared(span, heads, page_tokens) for span in spans),
            slots=torch.tensor(slots, device=device),
            rotation=span_rotation(heads, spans, heads.dtype),
            page_tokens=page_tokens,
        )

    def feed_forward(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        return feed_forward(x, gate_up, down, gate_up_bias, down_bias)

    def experts(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        """Weighted sum of each row's experts, float32 [rows, hidden]."""
        return experts(x, chosen, weights, gate_up, down)


@dataclass(frozen=True, slots=True)
class PreparedSpan:
    """One sequence's rows and keys."""

    rows: slice
    num_tokens: int
    first_slot: int
    scattered: torch.Tensor | None
    """Page numbers; absent where the pages follow each other: keys and values are then views."""
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class PlainStepAttention:
    """See `StepAttention`."""

    heads: HeadSpec
    groups: tuple[HeadGroup, ...]
    spans: tuple[PreparedSpan, ...]
    slots: torch.Tensor
    """Where the rows' keys and values go, [rows]."""
    rotation: Rotation | None
    page_tokens: int

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, clamp, rotate, write keys and values, attend: [rows, heads * head_dim]."""
        heads = self.heads
        num_qk = heads.num_heads + heads.num_kv_heads
        qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
        if qk_norm is not None:
            mean = None if mean_squares is None else mean_squares.unsqueeze(-1)
            qk = rms_norm(qk, qk_norm, heads.qk_norm_eps, mean)
        if heads.clip_qkv:
            # After the norm, as in transformers' OlmoeAttention.
            qk, v = qk.clamp(-heads.clip_qkv, heads.clip_qkv), v.clamp(-heads.clip_qkv, heads.clip_qkv)
        if self.rotation is not None:
            qk = rotate(qk, self.rotation)
        keys.index_copy_(1, self.slots, qk[:, heads.num_heads :].transpose(0, 1))
        values.index_copy_(1, self.slots, v.transpose(0, 1))
        mixed = [
            attention(qk[span.rows, : heads.num_heads], *self._read(span, keys, values), self.groups, heads.scale, span.mask)
            for span in self.spans
        ]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).reshape(qkv.shape[0], -1)

    def _read(self, span: PreparedSpan, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, [kv_heads, num_tokens, head_dim]."""
        if span.scattered is None:
            run = slice(span.first_slot, span.first_slot + span.num_tokens)
            return keys[:, run], values[:, run]
        return self._gather(keys, span, span.scattered), self._gather(values, span, span.scattered)

    def _gather(self, pool: torch.Tensor, span: PreparedSpan, scattered: torch.Tensor) -> torch.Tensor:
        paged = pool.unflatten(1, (-1, self.page_tokens))  # [kv_heads, pages, page_tokens, head_dim]
        gathered: torch.Tensor = paged.index_select(1, scattered).flatten(1, 2)
        return gathered[:, : span.num_tokens]


def _end(span: Span) -> int:
    return span.position + int(span.rows.stop - span.rows.start)


def _slot(span: Span, position: int, page_tokens: int) -> int:
    page = int(span.pages[position // page_tokens])
    return page * page_tokens + position % page_tokens


def _prepared(span: Span, heads: HeadSpec, page_tokens: int) -> PreparedSpan:
    device = heads.inverse_frequencies.device
    num_rows = span.rows.stop - span.rows.start
    masked = num_rows > 1 and span.position > 0
    return PreparedSpan(
        rows=span.rows,
        num_tokens=_end(span),
        first_slot=span.pages[0] * page_tokens,
        scattered=None if span.contiguous else torch.tensor(span.pages, device=device),
        mask=causal_mask(span.position, num_rows, heads.dtype, device) if masked else None,
    )
