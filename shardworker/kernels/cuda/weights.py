"""Weights on the GPU, in the layouts of `shardworker.kernels.linear`: a row's bytes are one run, read as whole lines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from shardworker.kernels.cuda.device import products
from shardworker.kernels.cuda.tiles import FEW_ROWS, tiles_for
from shardworker.kernels.linear import DenseWeight, GroupedWeight


@dataclass(frozen=True, slots=True)
class CudaDenseWeight(DenseWeight):
    """Kept in the dtype of the arithmetic."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in] -> [rows, out]; many rows by cuBLAS."""
        if x.shape[0] > FEW_ROWS:
            return functional.linear(x, self.tensor, bias)
        return _multiply(x, self, bias)

    def expert(self, index: int) -> CudaDenseWeight:
        """[out, in] of one expert; shares memory."""
        return CudaDenseWeight(self.tensor[index])


@dataclass(frozen=True, slots=True)
class CudaGroupedWeight(GroupedWeight):
    """Quantized; expanded in registers when multiplied."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        return _multiply(x, self, bias)

    def expert(self, index: int) -> CudaGroupedWeight:
        """[out, in] of one expert; shares memory."""
        return CudaGroupedWeight(self.values[index], self.scales[index], self.bits, self.num_inputs, self.dtype)

    def store(self, row: int, block: torch.Tensor) -> int:
        """Quantize [n, in] on the GPU into row `row` of the flattened weight."""
        # Slots leave `super()` without its class.
        return GroupedWeight.store(self, row, block.to(self.values.device))


CudaWeight = CudaDenseWeight | CudaGroupedWeight


def stored(weight: CudaWeight) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Values, scales (anything for dense weights, of which none are read) and bits (0: dense), as kernels want them."""
    if isinstance(weight, CudaGroupedWeight):
        return weight.values, weight.scales, weight.bits
    return weight.tensor, weight.tensor, 0


def _multiply(x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None) -> torch.Tensor:
    rows, outputs = x.shape[0], weight.num_outputs
    if rows == 0 or outputs == 0 or weight.num_inputs == 0:
        # A shard without heads or columns.
        empty = x.new_zeros((rows, outputs))
        return empty if bias is None else empty + bias
    x = x.contiguous()
    values, scales, bits = stored(weight)
    tiles = tiles_for(rows)
    out = x.new_empty((rows, outputs))
    grid = (math.ceil(rows / tiles.rows) * math.ceil(outputs / tiles.outputs),)
    products.linear[grid](
        x,
        values,
        scales,
        x if bias is None else bias,
        out,
        rows,
        NUM_OUTPUTS=outputs,
        INPUTS=weight.num_inputs,
        BITS=bits,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        STEP=tiles.step,
        **tiles.options(x.dtype),
    )
    return out
