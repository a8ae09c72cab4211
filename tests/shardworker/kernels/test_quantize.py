from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from shardworker.kernels import quantize as module
from shardworker.kernels.quantize import DIVISORS, quantize

F32 = np.float32


def search(group: np.ndarray) -> tuple[np.ndarray, np.float16, np.float32]:
    """Nibbles, scale and error of 32 weights, as the module's text says, one operation at a time."""
    extreme = group[np.abs(group).argmax()]
    best: tuple[np.ndarray, np.float16, np.float32] | None = None
    for divisor in DIVISORS:
        scale = np.float16(extreme / F32(divisor))
        inverse = F32(0) if scale == 0 else F32(1) / F32(scale)
        nibbles = np.clip(np.floor(group * inverse + F32(8.5)), 0, 15).astype(F32)
        terms = ((nibbles - F32(8)) * F32(scale) - group) ** 2
        while len(terms) > 1:
            half = len(terms) // 2
            terms = terms[:half] + terms[half:]
        if best is None or terms[0] < best[2]:
            best = nibbles, scale, terms[0]
    assert best is not None
    return best


@pytest.mark.parametrize("magnitude", [0.02, 1e4, 1e-6, 2e-7, 0])
def test_int4_is_the_arithmetic_that_the_text_states(magnitude: float) -> None:
    weight = (np.random.default_rng(0).normal(size=(20, 96)) * magnitude).astype(F32)
    values, scales = quantize(torch.from_numpy(weight), 4)
    for group, packed, scale in zip(weight.reshape(-1, 32), values.view(-1, 16).numpy(), scales.view(-1).numpy(), strict=True):
        nibbles, wanted, _ = search(group)
        assert scale.tobytes() == wanted.tobytes()
        assert np.array_equal(np.concatenate((packed & 15, packed >> 4)), nibbles)


def test_int4_with_the_first_divisor_alone_is_q4_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIVISORS", DIVISORS[:1])
    raw = np.random.default_rng(1).normal(size=(4, 64)).astype(F32)
    blocks = gguf.quantize(raw, gguf.GGMLQuantizationType.Q4_0).reshape(8, 18)
    values, scales = quantize(torch.from_numpy(raw), 4)
    assert np.array_equal(values.numpy().reshape(8, 16), blocks[:, 2:])
    assert np.array_equal(scales.numpy().reshape(8), blocks[:, :2].copy().view(np.float16).reshape(8))


def test_int4_errs_less_than_q4_0() -> None:
    raw = np.random.default_rng(2).normal(size=(200, 320)).astype(F32)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = ((gguf.dequantize(gguf.quantize(raw, kind), kind).reshape(raw.shape) - raw) ** 2).sum()
    ours = sum(float(search(group)[2]) for group in raw.reshape(-1, 32))
    assert ours < 0.98 * theirs


def test_int8_rounds_ties_to_even() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    values, scales = quantize(weight, 8)
    assert scales.tolist() == [[1.0]]
    assert values[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_any_width_and_dtype(bits: int) -> None:
    block = torch.randn(3, 50).bfloat16()
    values, scales = quantize(block, bits)
    whole, whole_scales = quantize(torch.cat((block.float(), torch.zeros(3, 14)), -1), bits)
    assert torch.equal(values, whole)
    assert torch.equal(scales, whole_scales)
    assert scales.shape == (3, 2)
