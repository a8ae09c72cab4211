from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch.nn import functional

from shardworker.kernels import linear
from shardworker.kernels.linear import DenseWeight, GroupedWeight

CPU = torch.device("cpu")
KINDS = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}


def grouped(weight: torch.Tensor, bits: int) -> GroupedWeight:
    found = GroupedWeight.empty(tuple(weight.shape), bits, torch.float32, CPU)
    assert found.store(0, weight.view(-1, weight.shape[-1])) == found.nbytes
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_the_grid_of_a_gguf_file_come_back_exactly(bits: int) -> None:
    raw = np.random.default_rng(0).normal(size=(24, 96)).astype(np.float32)
    weight = torch.from_numpy(gguf.dequantize(gguf.quantize(raw, KINDS[bits]), KINDS[bits]))
    assert torch.equal(grouped(weight, bits).dequantize(slice(None)), weight)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 8)])
def test_error_is_bounded_by_the_scale(bits: int, steps: int) -> None:
    weight = torch.randn(10, 50)
    error = (grouped(weight, bits).dequantize(slice(None)) - weight).abs()
    # Half a step, or a whole one at int4's shorter end; and the scale's own rounding.
    bound = functional.pad(weight, (0, 14)).view(10, 2, 32).abs().amax(-1).repeat_interleave(32, 1)[:, :50] / steps
    assert bool((error <= bound * (0.502 if bits == 8 else 1.005)).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [32, 50, 96])
def test_matmul_in_blocks_equals_the_expanded_weight(monkeypatch: pytest.MonkeyPatch, bits: int, inputs: int) -> None:
    weight, x, bias = grouped(torch.randn(40, inputs), bits), torch.randn(3, inputs), torch.randn(40)
    wanted = functional.linear(x, weight.dequantize(slice(None)), bias)
    torch.testing.assert_close(weight.matmul(x, bias), wanted)
    monkeypatch.setattr(linear, "DEQUANTIZED_BLOCK", 7 * inputs)
    torch.testing.assert_close(weight.matmul(x, bias), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_expert_shares_memory(bits: int) -> None:
    weight = grouped(torch.randn(3, 8, 32), bits)
    part = weight.expert(1)
    assert part.values.data_ptr() == weight.values[1].data_ptr()
    assert (part.num_outputs, part.num_inputs) == (8, 32)


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_groups_stay_zero(bits: int) -> None:
    assert torch.equal(grouped(torch.zeros(2, 32), bits).dequantize(slice(None)), torch.zeros(2, 32))


def test_dense_weight_converts_when_stored() -> None:
    weight = DenseWeight.empty((2, 3, 4), torch.bfloat16, CPU)
    block = torch.randn(2, 4)
    assert weight.store(3, block) == 16
    assert torch.equal(weight.expert(1).tensor[:2], block.bfloat16())
