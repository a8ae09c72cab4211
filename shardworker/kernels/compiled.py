"""The arithmetic in compiled code, for the CPU: see `shardworker.native`.

Every output of every row is the same sequence of operations whatever stands beside the row, so results are independent of the
batch, of how a prompt is cut into chunks, and of the number of threads. Products are summed in float32.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8
from protos.tensors import BLOCK
from shardworker.kernels.rope import span_rotation
from shardworker.native import _operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import Quantization
    from shardworker.kernels.interface import HeadSpec, Span, StepAttention, Weight
    from shardworker.native._operations import Pool

PANEL = 16
"""Outputs that lie together; the last panel of a weight is filled up."""

VARIANTS = _operations.variants()
"""Instruction sets of this processor, best first."""

# As in native/weights.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _INT4 = 3, 4
_KINDS = {QUANTIZATION_INT8: _INT8, QUANTIZATION_INT4: _INT4}
_QUANTIZED = frozenset(_KINDS.values())
_GROUP_BYTES = {0: 4 * BLOCK, 1: 2 * BLOCK, 2: 2 * BLOCK, _INT8: BLOCK, _INT4: BLOCK // 2}


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """[out, in] or [experts, out, in] in panels of 16 outputs and groups of 32 inputs, as native/weights.h describes."""

    kernels: CompiledKernels
    kind: int
    dtype: torch.dtype
    """Of what is multiplied."""
    num_outputs: int
    num_inputs: int
    values: torch.Tensor
    """uint8 [experts, bytes of a matrix]."""
    scales: torch.Tensor | None
    """float16 [experts, scales of a matrix]; quantized kinds only."""

    @classmethod
    def empty(cls, kernels: CompiledKernels, shape: tuple[int, ...], kind: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Take memory, uninitialized."""
        *stacked, outputs, inputs = shape
        groups = math.ceil(outputs / PANEL) * PANEL * math.ceil(inputs / BLOCK)
        experts = math.prod(stacked)
        values = torch.empty((experts, groups * _GROUP_BYTES[kind]), dtype=torch.uint8, device=device)
        scales = torch.empty((experts, groups), dtype=torch.float16, device=device) if kind in _QUANTIZED else None
        if device.type == "cpu":
            for part in (values, scales):
                if part is not None:
                    _operations.use_huge_pages(part.data_ptr(), part.nbytes)
        return cls(kernels, kind, dtype, outputs, inputs, values, scales)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in] -> float32 [rows, out]."""
        x = _rows(x, self.num_inputs)
        rows = x.shape[0]
        out = torch.empty((rows, self.num_outputs), dtype=torch.float32)
        if self.num_inputs == 0:
            return out.zero_() if bias is None else out.copy_(bias)
        kernels = self.kernels
        _operations.linear(
            kernels.pool, kernels.variant, *self.numbers, x.data_ptr(), rows, _address(bias), out.data_ptr(), _DTYPES[x.dtype]
        )
        return out

    def expert(self, index: int) -> PackedWeight:
        """[out, in] of one expert; shares memory."""
        one = slice(index, index + 1)
        scales = None if self.scales is None else self.scales[one]
        return PackedWeight(self.kernels, self.kind, self.dtype, self.num_outputs, self.num_inputs, self.values[one], scales)

    def store(self, row: int, block: torch.Tensor) -> int:
        """Convert or quantize [n, in] and lay it out from row `row` of the flattened weight on."""
        if block.dtype not in _DTYPES or block.stride(-1) != 1:
            block = block.float().contiguous()
        count, height = block.shape[0], self.values.shape[0] * self.num_outputs
        if block.shape[1] != self.num_inputs or not 0 <= row <= height - count:
            raise ValueError(f"wanted [n, {self.num_inputs}] within {height} rows, found {list(block.shape)} at row {row}")
        _operations.store(
            self.kernels.pool,
            self.kind,
            self.num_outputs,
            self.num_inputs,
            self.values.data_ptr(),
            _address(self.scales),
            row,
            count,
            block.data_ptr(),
            block.stride(0) * block.itemsize,
            _DTYPES[block.dtype],
        )
        return count * self.nbytes // max(1, height)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """Kind, addresses and shape, as compiled code takes them."""
        return self.kind, self.values.data_ptr(), _address(self.scales), self.num_outputs, self.num_inputs


class CompiledKernels:
    """Kernels of one instruction set, and the threads that compute; for one caller at a time, so for one worker."""

    def __init__(self, num_threads: int, variant: str = VARIANTS[0]) -> None:
        """Start the threads.

        Args:
            num_threads: that compute, the caller's included.
            variant: of `VARIANTS`.

        """
        self.device = torch.device("cpu")
        self.name = variant
        self.variant = VARIANTS.index(variant)
        self.pool: Pool = _operations.create_pool(num_threads)

    def wake(self) -> None:
        """Keep threads spinning between the calls of a round: to wake one takes as long as a small product."""
        _operations.wake(self.pool)

    def rest(self) -> None:
        """Let them sleep: what comes next needs their cores."""
        _operations.rest(self.pool)

    def empty_weight(
        self, shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype, device: torch.device
    ) -> Weight:
        """Take the memory of a weight."""
        return PackedWeight.empty(self, shape, _KINDS.get(quantization, _DTYPES[dtype]), dtype, device)

    def begin(self, heads: HeadSpec, spans: Sequence[Span], page_tokens: int) -> StepAttention:
        """Prepare the attention of a step."""
        return CompiledStepAttention(self, heads, spans, page_tokens)

    def feed_forward(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """[rows, hidden] -> float32 [rows, hidden]."""
        return self._feed_forward(x, gate_up, down, (_address(gate_up_bias), _address(down_bias)), (0, 0, 0, 0))

    def experts(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        """Weighted sum of each row's experts, float32 [rows, hidden]."""
        chosen, weights = chosen.to(torch.int32).contiguous(), weights.to(torch.float32).contiguous()
        num_experts = _packed(down).values.shape[0]
        routing = (chosen.data_ptr(), weights.data_ptr(), num_experts, chosen.shape[1])
        return self._feed_forward(x, gate_up, down, (0, 0), routing)

    def _feed_forward(
        self, x: torch.Tensor, gate_up: Weight, down: Weight, biases: tuple[int, int], routing: tuple[int, int, int, int]
    ) -> torch.Tensor:
        x = _rows(x, gate_up.num_inputs)
        rows = x.shape[0]
        out = torch.empty((rows, down.num_outputs), dtype=torch.float32)
        first, second = _packed(gate_up).numbers, _packed(down).numbers
        data = (x.data_ptr(), rows, *biases, out.data_ptr(), _DTYPES[x.dtype])
        _operations.feed_forward(self.pool, self.variant, *first, *second, *data, *routing)
        return out


class CompiledStepAttention:
    """See `StepAttention`; all rows of a step in one call."""

    def __init__(self, kernels: CompiledKernels, heads: HeadSpec, spans: Sequence[Span], page_tokens: int) -> None:
        """Lay out tables and numbers once for all layers."""
        self._kernels = kernels
        self._heads = heads
        self._rows = spans[-1].rows.stop
        rotation = span_rotation(heads, spans, torch.float32)
        self._cosines = None if rotation is None else rotation.cos
        self._sines = None if rotation is None else rotation.sin
        numbers: list[tuple[int, int, int, int]] = []
        pages: list[int] = []
        for span in spans:
            numbers.append((span.rows.start, span.rows.stop - span.rows.start, span.position, len(pages)))
            pages += span.pages
        self._spans = torch.tensor(numbers, dtype=torch.int64)
        self._pages = torch.tensor(pages, dtype=torch.int32)
        self._kv_head_of = torch.tensor(heads.kv_head_of, dtype=torch.int32)
        self._num_spans = len(spans)
        self._page_tokens = page_tokens
        # Three floats, as whole numbers with their bits.
        self._reals = struct.unpack("3q", struct.pack("3d", heads.scale, heads.qk_norm_eps, heads.clip_qkv))

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, clamp, rotate, write keys and values, attend: [rows, heads * head_dim]."""
        heads, kernels = self._heads, self._kernels
        qkv = qkv.float().contiguous()
        mean_squares = None if mean_squares is None else mean_squares.contiguous()
        out = torch.empty((self._rows, heads.num_heads * heads.head_dim), dtype=torch.float32)
        _operations.attention(
            kernels.pool,
            kernels.variant,
            qkv.data_ptr(),
            _address(qk_norm),
            _address(mean_squares),
            _address(self._cosines),
            _address(self._sines),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            self._spans.data_ptr(),
            self._pages.data_ptr(),
            self._kv_head_of.data_ptr(),
            self._num_spans,
            self._rows,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            0 if self._cosines is None else heads.rotary_dims,
            keys.shape[1],
            self._page_tokens,
            _DTYPES[heads.dtype],
            *self._reals,
        )
        return out.to(heads.dtype)


def _packed(weight: Weight) -> PackedWeight:
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"a weight of other kernels: {type(weight).__name__}")
    return weight


def _rows(x: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """As compiled code reads them, which looks at no shape."""
    if x.shape[1] != num_inputs:
        raise ValueError(f"wanted [rows, {num_inputs}], found {list(x.shape)}")
    return x.contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
