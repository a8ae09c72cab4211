from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE
from shardworker.kernels.linear import DenseWeight
from shardworker.kernels.plain import PlainKernels

if TYPE_CHECKING:
    from protos.plan_pb2 import Quantization
    from shardworker.kernels.cuda.kernels import CudaKernels
    from shardworker.kernels.interface import Weight

QUANTIZATIONS = (QUANTIZATION_NONE, QUANTIZATION_INT8, QUANTIZATION_INT4)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def filled(kernels: CudaKernels | PlainKernels, tensor: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> Weight:
    weight = kernels.empty_weight(tuple(tensor.shape), quantization, dtype, kernels.device)
    rows = tensor.view(-1, tensor.shape[-1])
    # In two blocks, as a loader would.
    cut = rows.shape[0] // 3
    taken = weight.store(0, rows[:cut]) + weight.store(cut, rows[cut:])
    assert taken == weight.nbytes
    return weight


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "rows", "dtype"),
    [
        (40, 80, 3, torch.float32),
        (37, 96, 17, torch.bfloat16),
        (33, 576, 1, torch.bfloat16),
        (20, 50, 16, torch.float16),
        (130, 96, 70, torch.bfloat16),
    ],
)
def test_products_equal_torch(  # noqa: PLR0917
    kernels: CudaKernels, quantization: Quantization, outputs: int, inputs: int, rows: int, dtype: torch.dtype
) -> None:
    plain = PlainKernels(kernels.device)
    tensor = torch.randn(outputs, inputs) * 0.2
    x, bias = torch.randn(rows, inputs, device=kernels.device).to(dtype), torch.randn(outputs, device=kernels.device).to(dtype)
    ours, reference = (filled(k, tensor, quantization, dtype) for k in (kernels, plain))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours.matmul(x, bias), reference.matmul(x, bias), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.matmul(x), reference.matmul(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_expert_is_a_part_of_the_weight(kernels: CudaKernels, quantization: Quantization) -> None:
    weight = filled(kernels, torch.randn(3, 20, 64), quantization, torch.float32)
    reference = filled(PlainKernels(kernels.device), torch.zeros(3, 20, 64), quantization, torch.float32)
    reference.store(0, torch.zeros(60, 64))
    x = torch.randn(2, 64, device=kernels.device)
    part = weight.expert(1)
    assert type(part) is type(weight)
    assert (part.num_outputs, part.num_inputs, part.nbytes * 3) == (20, 64, weight.nbytes)
    assert part.matmul(x).shape == reference.expert(1).matmul(x).shape
    block = torch.randn(20, 64)
    part.store(0, block)
    again = filled(kernels, block, quantization, torch.float32)
    assert torch.equal(weight.expert(1).matmul(x), again.matmul(x))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(kernels: CudaKernels, quantization: Quantization, dtype: torch.dtype) -> None:
    weight = filled(kernels, torch.randn(24, 320) * 0.2, quantization, dtype)
    x = torch.randn(20, 320, device=kernels.device).to(dtype)
    together = weight.matmul(x)
    for row in (0, 7, 15, 16, 19):
        assert torch.equal(weight.matmul(x[row : row + 1])[0], together[row])
    assert torch.equal(weight.matmul(x.flip(0)).flip(0), together)
    assert torch.equal(weight.matmul(x[3:9]), together[3:9])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_weight_without_inputs_or_outputs_gives_the_bias(kernels: CudaKernels, quantization: Quantization) -> None:
    bias = torch.randn(6, device=kernels.device)
    weight = kernels.empty_weight((6, 0), quantization, torch.float32, kernels.device)
    x = torch.zeros(2, 0, device=kernels.device)
    assert torch.equal(weight.matmul(x, bias), bias.expand(2, 6))
    assert torch.equal(weight.matmul(x), torch.zeros(2, 6, device=kernels.device))
    empty = kernels.empty_weight((0, 32), quantization, torch.float32, kernels.device)
    assert empty.matmul(torch.zeros(2, 32, device=kernels.device)).shape == (2, 0)


def test_a_dense_weight_is_one_for_the_loader(kernels: CudaKernels) -> None:
    weight = kernels.empty_weight((2, 3), QUANTIZATION_NONE, torch.float32, torch.device("meta"))
    assert isinstance(weight, DenseWeight)
    assert weight.nbytes == 24
