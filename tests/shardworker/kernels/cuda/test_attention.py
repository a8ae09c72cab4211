from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shardworker.kernels.cuda import attention as cuda_attention
from shardworker.kernels.interface import DynamicRope, HeadSpec, Span
from shardworker.kernels.plain import PlainKernels

if TYPE_CHECKING:
    from shardworker.kernels.cuda.kernels import CudaKernels

PAGE, PAGES = 4, 40
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def head_spec(device: torch.device, **changes: Any) -> HeadSpec:
    heads = HeadSpec(
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        kv_head_of=(0, 0, 0, 1, 1, 1, 2, 2, 2),
        scale=0.125,
        qk_norm_eps=1e-5,
        clip_qkv=0.0,
        rotary_dims=64,
        inverse_frequencies=torch.empty(0),
        attention_factor=1.0,
        dynamic=None,
        dtype=torch.float32,
    )
    heads = replace(heads, **changes)
    frequencies = 1e4 ** (-torch.arange(0, heads.rotary_dims, 2, device=device) / max(1, heads.rotary_dims))
    return replace(heads, inverse_frequencies=frequencies)


def spans_of(*parts: tuple[int, int]) -> list[Span]:
    """Spans of (position, rows), their pages scattered."""
    free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(5)).tolist()
    spans: list[Span] = []
    first = 0
    for position, rows in parts:
        pages = tuple(free.pop() for _ in range(-(-(position + rows) // PAGE)))
        spans.append(Span(slice(first, first + rows), position, position + rows, pages, contiguous=False))
        first += rows
    return spans


class Case:
    """A layer's rows and its pool, both filled."""

    def __init__(self, device: torch.device, heads: HeadSpec, spans: list[Span]) -> None:
        self.heads, self.spans = heads, spans
        rows = spans[-1].rows.stop
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, heads.dtype)

        self.qkv = draw(rows, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
        self.norm = draw(heads.num_heads + heads.num_kv_heads, heads.head_dim) * 0.3 + 1
        self.squares = draw(rows, heads.num_heads + heads.num_kv_heads).float().abs() + 0.5
        self.pool = draw(2, heads.num_kv_heads, PAGES * PAGE, heads.head_dim)

    def run(self, kernels: Any, *, norm: bool = True, mean: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.pool.clone()
        step = kernels.begin(self.heads, self.spans, PAGE)
        out = step(self.qkv, self.norm if norm else None, self.squares if mean else None, pool[0], pool[1])
        return out, pool


def check(kernels: CudaKernels, case: Case, **options: bool) -> None:
    found, pool = case.run(kernels, **options)
    wanted, wanted_pool = case.run(PlainKernels(kernels.device), **options)
    assert found.dtype == wanted.dtype
    tolerance = TOLERANCES[case.heads.dtype]
    torch.testing.assert_close(pool, wanted_pool, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 1)],
        [(30, 1)],
        [(0, 5)],
        [(7, 20)],
        [(3, 1), (0, 6), (13, 1), (5, 3)],
        [(9, 1), (2, 1), (0, 1)],
    ],
)
def test_steps_of_all_kinds_equal_torch(kernels: CudaKernels, parts: list[tuple[int, int]]) -> None:
    check(kernels, Case(kernels.device, head_spec(kernels.device), spans_of(*parts)))


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 80, "rotary_dims": 80},
        {"head_dim": 128, "rotary_dims": 32, "dtype": torch.bfloat16},
        {"dtype": torch.float16, "clip_qkv": 0.8},
        {"rotary_dims": 0},
        {"dynamic": DynamicRope(1e4, 2.0, 8)},
        # A cut through groups: one head of the first, three of the second, two of the last.
        {"num_heads": 6, "kv_head_of": (0, 1, 1, 1, 2, 2)},
        {"num_heads": 1, "num_kv_heads": 1, "kv_head_of": (0,), "head_dim": 16, "rotary_dims": 16},
    ],
)
def test_heads_of_all_kinds_equal_torch(kernels: CudaKernels, changes: dict[str, Any]) -> None:
    check(kernels, Case(kernels.device, head_spec(kernels.device, **changes), spans_of((6, 1), (4, 7), (21, 1))))


@pytest.mark.parametrize("options", [{"norm": False}, {"norm": True}, {"norm": True, "mean": True}])
def test_norms_of_all_kinds_equal_torch(kernels: CudaKernels, options: dict[str, bool]) -> None:
    check(kernels, Case(kernels.device, head_spec(kernels.device, clip_qkv=1.5), spans_of((6, 1), (4, 3))), **options)


def test_rows_may_come_in_float32(kernels: CudaKernels) -> None:
    case = Case(kernels.device, head_spec(kernels.device, dtype=torch.bfloat16), spans_of((6, 1), (4, 3)))
    found, pool = case.run(kernels, norm=False)
    case.qkv = case.qkv.float()
    again, again_pool = case.run(kernels, norm=False)
    assert torch.equal(again, found)
    assert torch.equal(again_pool, pool)


def test_long_texts_are_read_in_stretches(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "SPLIT_TOKENS", 32)
    check(kernels, Case(kernels.device, head_spec(kernels.device), spans_of((69, 1), (31, 1), (32, 1))))


def test_prompts_longer_than_a_tile(kernels: CudaKernels) -> None:
    check(kernels, Case(kernels.device, head_spec(kernels.device, num_heads=3, kv_head_of=(0, 1, 2)), spans_of((2, 1), (5, 90))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_row_has_the_same_bits_in_any_company(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cuda_attention, "SPLIT_TOKENS", 32)
    heads = head_spec(kernels.device, dtype=dtype)
    case = Case(kernels.device, heads, spans_of((40, 1), (3, 1), (70, 1), (12, 4)))
    together, _ = case.run(kernels)
    for row in range(3):
        alone = Case(kernels.device, heads, [replace(case.spans[row], rows=slice(0, 1))])
        alone.qkv, alone.norm, alone.pool = case.qkv[row : row + 1], case.norm, case.pool
        assert torch.equal(alone.run(kernels)[0][0], together[row])


def test_a_shard_without_heads_can_begin(kernels: CudaKernels) -> None:
    heads = head_spec(kernels.device, num_heads=0, num_kv_heads=0, kv_head_of=())
    assert kernels.begin(heads, spans_of((0, 1), (0, 3)), PAGE) is not None
