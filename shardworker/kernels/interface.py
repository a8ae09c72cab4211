"""What a device must be able to compute: one Protocol, so that torch operators, compiled code and CUDA kernels can take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import Quantization


class DynamicRope(NamedTuple):
    """Rotary frequencies that grow with the text (`plan.proto`'s DynamicNtk)."""

    base: float
    factor: float
    original_positions: int


@dataclass(frozen=True, slots=True, eq=False)
class HeadSpec:
    """Attention of one shard; equal in all layers."""

    num_heads: int
    """Query heads here."""
    num_kv_heads: int
    """Key/value heads here."""
    head_dim: int
    kv_head_of: tuple[int, ...]
    """For each query head here the kv head here that it reads, ascending."""
    scale: float
    """Multiplies q.k."""
    qk_norm_eps: float
    clip_qkv: float
    """0: no clamp."""
    rotary_dims: int
    """First dimensions of a head that are rotated; 0: none."""
    inverse_frequencies: torch.Tensor
    """float32 [rotary_dims / 2], on the device."""
    attention_factor: float
    """Multiplies cos and sin."""
    dynamic: DynamicRope | None
    dtype: torch.dtype
    """Of the arithmetic, and of keys and values."""


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a step, and where its tokens lie."""

    rows: slice
    """Of the step's rows."""
    position: int
    """Of the first of them in the sequence."""
    prompt_tokens: int
    """Of the sequence."""
    pages: Sequence[int]
    """KV pages of positions 0 ... position + rows, `page_tokens` each."""
    contiguous: bool
    """Whether the pages follow each other."""


class Weight(Protocol):
    """[out, in], or [experts, out, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    @property
    def num_outputs(self) -> int:
        """Size of the `out` dimension."""

    @property
    def num_inputs(self) -> int:
        """Size of the `in` dimension."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply [rows, in] by the transpose of [out, in], plus `bias`: [rows, out], in the dtype of `x` or in float32."""

    def expert(self, index: int) -> Weight:
        """[out, in] of one expert; shares memory."""

    def store(self, row: int, block: torch.Tensor) -> int:
        """Put [n, in] of any float dtype, on the CPU, at row `row` of [experts * out, in]; gives the bytes it takes here."""


class StepAttention(Protocol):
    """The attention of one step's rows, prepared for all layers."""

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, clamp, rotate, write keys and values, attend: softmax(scale * q.k) v, causal.

        Args:
            qkv: [rows, heads + 2 * kv_heads, head_dim], in the arithmetic's dtype or float32.
            qk_norm: RMS norm weights [heads + kv_heads, head_dim]; absent where the model has none.
            mean_squares: float32 [rows, heads + kv_heads], where a norm goes over all heads of the model.
            keys: the layer's pool, [kv_heads, slots, head_dim]; slot = page * page_tokens + offset.
            values: as `keys`.

        Returns:
            [rows, heads * head_dim] in the arithmetic's dtype.

        """


class Kernels(Protocol):
    """The arithmetic of one device."""

    @property
    def name(self) -> str:
        """For people: "torch", "avx512", ..."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def wake(self) -> None:
        """Work comes: threads may stay awake for it until `rest`."""

    def rest(self) -> None:
        """No work until the next `wake`."""

    def empty_weight(
        self, shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype, device: torch.device
    ) -> Weight:
        """Take the memory of a weight, uninitialized; none on the meta device, to learn its size."""

    def begin(self, heads: HeadSpec, spans: Sequence[Span], page_tokens: int) -> StepAttention:
        """Prepare the attention of a step."""

    def feed_forward(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)): [rows, hidden] -> [rows, hidden], float32 or as `x`; `gate_up` has the gate first."""

    def experts(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        """Weighted sum of each row's experts, float32 [rows, hidden].

        A row's sum runs in ascending order of expert, in float32.

        Args:
            x: [rows, hidden].
            chosen: expert ids, [rows, k], on the CPU, distinct within a row.
            weights: float32 [rows, k], on the CPU.
            gate_up: [experts, 2 * columns, hidden].
            down: [experts, hidden, columns].

        """
