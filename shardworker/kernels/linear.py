"""Weights in torch operators: kept whole, or quantized and expanded block by block when they are multiplied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional

from protos.tensors import BLOCK
from shardworker.kernels.quantize import INT8_BITS, quantize

DEQUANTIZED_BLOCK = 1 << 20
"""Weights that are expanded at a time: 4 MiB in float32, which a cache still holds."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """Kept in the dtype of the arithmetic."""

    tensor: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        """Take memory, uninitialized."""
        return cls(torch.empty(shape, dtype=dtype, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tensor.nbytes

    @property
    def num_outputs(self) -> int:
        """Size of the `out` dimension."""
        return self.tensor.shape[-2]

    @property
    def num_inputs(self) -> int:
        """Size of the `in` dimension."""
        return self.tensor.shape[-1]

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        return functional.linear(x, self.tensor, bias)

    def expert(self, index: int) -> DenseWeight:
        """[out, in] of one expert; shares memory."""
        return DenseWeight(self.tensor[index])

    def store(self, row: int, block: torch.Tensor) -> int:
        """Convert and copy [n, in] to row `row` of the flattened weight."""
        target = self.tensor.view(-1, self.num_inputs)[row : row + block.shape[0]]
        target.copy_(block)
        return target.nbytes


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """Quantized; dequantized block by block when multiplied."""

    values: torch.Tensor
    """int8 [..., out, groups * 32], or uint8 [..., out, groups * 16]: element i of a group low, 16 + i high."""
    scales: torch.Tensor
    """float16 [..., out, groups]."""
    bits: int
    num_inputs: int
    """Without the zeros that fill the last group."""
    dtype: torch.dtype
    """Of the arithmetic."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Take memory, uninitialized."""
        *rows, inputs = shape
        groups = math.ceil(inputs / BLOCK)
        kind, width = (torch.int8, groups * BLOCK) if bits == INT8_BITS else (torch.uint8, groups * BLOCK // 2)
        values = torch.empty((*rows, width), dtype=kind, device=device)
        return cls(values, torch.empty((*rows, groups), dtype=torch.float16, device=device), bits, inputs, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def num_outputs(self) -> int:
        """Size of the `out` dimension."""
        return self.values.shape[-2]

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in] -> [rows, out], expanding a bounded number of weights at a time."""
        block = max(1, DEQUANTIZED_BLOCK // max(1, self.num_inputs))
        if self.num_outputs <= block:
            return functional.linear(x, self.dequantize(slice(None)), bias)
        out = x.new_empty((x.shape[0], self.num_outputs))
        for start in range(0, self.num_outputs, block):
            rows = slice(start, start + block)
            out[:, rows] = functional.linear(x, self.dequantize(rows), None if bias is None else bias[rows])
        return out

    def expert(self, index: int) -> GroupedWeight:
        """[out, in] of one expert; shares memory."""
        return GroupedWeight(self.values[index], self.scales[index], self.bits, self.num_inputs, self.dtype)

    def store(self, row: int, block: torch.Tensor) -> int:
        """Quantize [n, in] into row `row` of the flattened weight."""
        values, scales = quantize(block, self.bits)
        target = self.values.view(-1, self.values.shape[-1])[row : row + block.shape[0]]
        target_scales = self.scales.view(-1, self.scales.shape[-1])[row : row + block.shape[0]]
        target.copy_(values)
        target_scales.copy_(scales)
        return target.nbytes + target_scales.nbytes

    def dequantize(self, rows: slice) -> torch.Tensor:
        """Expand some rows of an [out, in] weight, in float32 and then rounded once to the dtype of the arithmetic."""
        values, scales = self.values[rows], self.scales[rows]
        if self.bits == INT8_BITS:
            wide = values.view(values.shape[0], -1, BLOCK).float()
        else:
            pairs = values.view(values.shape[0], -1, BLOCK // 2)
            wide = torch.cat((pairs & 15, pairs >> 4), -1).float() - 8
        wide *= scales.unsqueeze(-1).float()
        return wide.view(values.shape[0], -1)[:, : self.num_inputs].to(self.dtype)
