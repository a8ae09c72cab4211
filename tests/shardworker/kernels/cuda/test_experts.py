from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE
from shardworker.kernels.cuda import experts as cuda_experts
from shardworker.kernels.plain import PlainKernels

if TYPE_CHECKING:
    from protos.plan_pb2 import Quantization
    from shardworker.kernels.cuda.kernels import CudaKernels
    from shardworker.kernels.interface import Weight

EXPERTS, CHOSEN, HIDDEN, COLUMNS = 6, 3, 72, 96
QUANTIZATIONS = (QUANTIZATION_NONE, QUANTIZATION_INT8, QUANTIZATION_INT4)


def route(rows: int, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([torch.randperm(experts)[:CHOSEN] for _ in range(rows)]).int(), torch.rand(rows, CHOSEN)


def pair(
    kernels: CudaKernels | PlainKernels, quantization: Quantization, dtype: torch.dtype, columns: int = COLUMNS
) -> list[Weight]:
    generator = torch.Generator().manual_seed(3)
    weights = []
    for shape in ((EXPERTS, 2 * columns, HIDDEN), (EXPERTS, HIDDEN, columns)):
        weight = kernels.empty_weight(shape, quantization, dtype, kernels.device)
        if columns:
            weight.store(0, torch.randn(shape[0] * shape[1], shape[2], generator=generator) * 0.2)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (20, torch.float32), (70, torch.float32)])
def test_experts_equal_torch(kernels: CudaKernels, quantization: Quantization, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, HIDDEN, device=kernels.device).to(dtype)
    chosen, weights = route(rows)
    plain = PlainKernels(kernels.device)
    found = kernels.experts(x, chosen, weights, *pair(kernels, quantization, dtype))
    wanted = plain.experts(x, chosen, weights, *pair(plain, quantization, dtype))
    assert found.dtype == torch.float32
    # Sums of about 2; torch rounds to bfloat16 three times on the way, the kernels once.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [3, 70])
def test_experts_without_rows_are_left_out(kernels: CudaKernels, rows: int) -> None:
    plain = PlainKernels(kernels.device)
    x = torch.randn(rows, HIDDEN, device=kernels.device)
    chosen, weights = torch.tensor([[4, 1, 2]]).expand(rows, 3).contiguous(), torch.rand(rows, 3)
    ours, theirs = (pair(k, QUANTIZATION_NONE, torch.float32) for k in (kernels, plain))
    torch.testing.assert_close(kernels.experts(x, chosen, weights, *ours), plain.experts(x, chosen, weights, *theirs))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_row_has_the_same_bits_in_any_company(kernels: CudaKernels, quantization: Quantization) -> None:
    gate_up, down = pair(kernels, quantization, torch.bfloat16, columns=40)
    x = torch.randn(20, HIDDEN, device=kernels.device).to(torch.bfloat16)
    chosen, weights = route(20)
    together = kernels.experts(x, chosen, weights, gate_up, down)
    for row in (0, 19):
        alone = slice(row, row + 1)
        assert torch.equal(kernels.experts(x[alone], chosen[alone], weights[alone], gate_up, down)[0], together[row])
    elsewhere = (chosen + 1) % EXPERTS
    elsewhere[4] = chosen[4]
    assert torch.equal(kernels.experts(x, elsewhere, weights, gate_up, down)[4], together[4])


def test_the_order_in_which_experts_are_named_does_not_matter(kernels: CudaKernels) -> None:
    gate_up, down = pair(kernels, QUANTIZATION_NONE, torch.float32)
    x = torch.randn(2, HIDDEN, device=kernels.device)
    chosen, weights = route(2)
    found = kernels.experts(x, chosen.flip(1), weights.flip(1), gate_up, down)
    assert torch.equal(found, kernels.experts(x, chosen, weights, gate_up, down))


def test_many_rows_are_done_in_parts(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = pair(kernels, QUANTIZATION_NONE, torch.float32, columns=32)
    x = torch.randn(70, HIDDEN, device=kernels.device)
    chosen, weights = route(70)
    whole = kernels.experts(x, chosen, weights, gate_up, down)
    monkeypatch.setattr(cuda_experts, "PRODUCT_BYTES", 30 * CHOSEN * HIDDEN * 4)
    torch.testing.assert_close(kernels.experts(x, chosen, weights, gate_up, down), whole, rtol=1e-5, atol=1e-5)


def test_no_columns_give_zeros(kernels: CudaKernels) -> None:
    gate_up, down = pair(kernels, QUANTIZATION_NONE, torch.float32, columns=0)
    x = torch.randn(3, HIDDEN, device=kernels.device)
    assert torch.equal(kernels.experts(x, *route(3), gate_up, down), torch.zeros_like(x))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_dense_block_equals_torch(kernels: CudaKernels, quantization: Quantization) -> None:
    plain = PlainKernels(kernels.device)
    x = torch.randn(5, HIDDEN, device=kernels.device)
    biases = torch.randn(2 * COLUMNS, device=kernels.device), torch.randn(HIDDEN, device=kernels.device)
    ours, theirs = ([part.expert(0) for part in pair(k, quantization, torch.float32)] for k in (kernels, plain))
    found, wanted = kernels.feed_forward(x, *ours, *biases), plain.feed_forward(x, *theirs, *biases)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
