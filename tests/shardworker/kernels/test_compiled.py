"""Compiled kernels against torch's operators, on every instruction set of this processor, and bit for bit against themselves."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("shardworker.native._operations", reason="no compiled kernels: install with a C compiler")

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE, Quantization
from shardworker.kernels.compiled import VARIANTS, CompiledKernels
from shardworker.kernels.interface import HeadSpec, Kernels, Span, Weight
from shardworker.kernels.linear import GroupedWeight
from shardworker.kernels.plain import PlainKernels
from shardworker.kernels.quantize import INT4_BITS, INT8_BITS, quantize

CPU = torch.device("cpu")
PLAIN = PlainKernels(CPU)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZATIONS = (QUANTIZATION_NONE, QUANTIZATION_INT8, QUANTIZATION_INT4)
# Activations between two products are rounded to bfloat16 where these are multiplied in pairs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-5}


@pytest.fixture(params=[(variant, threads) for variant in VARIANTS for threads in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def compiled(request: pytest.FixtureRequest) -> CompiledKernels:
    variant, threads = request.param
    return CompiledKernels(threads, variant)


def filled(kernels: Kernels, matrix: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> Weight:
    weight = kernels.empty_weight(tuple(matrix.shape), quantization, dtype, CPU)
    rows = matrix.reshape(-1, matrix.shape[-1])
    weight.store(0, rows[:3])
    weight.store(3, rows[3:])
    return weight


def exact(matrix: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """What the weight stands for, in float64."""
    if quantization == QUANTIZATION_NONE:
        return matrix.to(dtype).double()
    kept = filled(PLAIN, matrix, quantization, torch.float32)
    assert isinstance(kept, GroupedWeight)
    return kept.dequantize(slice(None)).double()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (5, 33), (300, 257)])
def test_a_product_is_right_and_independent_of_the_batch(
    compiled: CompiledKernels, shape: tuple[int, int], dtype: torch.dtype, quantization: Quantization
) -> None:
    matrix, x, bias = torch.randn(shape) * 0.1, torch.randn(27, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    weight = filled(compiled, matrix, quantization, dtype)
    found = weight.matmul(x, bias)
    assert found.dtype == torch.float32
    assert error(found, x.double() @ exact(matrix, quantization, dtype).T + bias.double()) < 1e-5
    for rows in (1, 2, 3, 5, 8, 13):
        assert torch.equal(weight.matmul(x[:rows], bias), found[:rows])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_experts", "hidden", "columns", "k", "rows"), [(8, 64, 32, 2, 20), (5, 70, 96, 3, 1), (6, 96, 40, 4, 50)]
)
def test_experts_are_right_and_independent_of_the_batch(  # noqa: PLR0917  # a case's numbers
    compiled: CompiledKernels,
    num_experts: int,
    hidden: int,
    columns: int,
    k: int,
    rows: int,
    dtype: torch.dtype,
    quantization: Quantization,
) -> None:
    gate_up, down = torch.randn(num_experts, 2 * columns, hidden) * 0.1, torch.randn(num_experts, hidden, columns) * 0.1
    if quantization == QUANTIZATION_NONE:
        gate_up, down = gate_up.to(dtype).float(), down.to(dtype).float()
    x, weights = torch.randn(rows, hidden).to(dtype), torch.rand(rows, k)
    chosen = torch.stack([torch.randperm(num_experts)[:k] for _ in range(rows)]).int()
    own = [filled(compiled, matrix, quantization, dtype) for matrix in (gate_up, down)]
    plain = [filled(PLAIN, matrix, quantization, torch.float32) for matrix in (gate_up, down)]
    found = compiled.experts(x, chosen, weights, *own)
    assert error(found, PLAIN.experts(x.float(), chosen, weights, *plain)) < TOLERANCE[dtype]
    for row in range(0, rows, 7):
        one = slice(row, row + 1)
        assert torch.equal(compiled.experts(x[one], chosen[one], weights[one], *own), found[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "biased"), [(40, True), (64, False), (33, True)])
def test_a_dense_block_is_right(compiled: CompiledKernels, columns: int, dtype: torch.dtype, *, biased: bool) -> None:
    gate_up, down = torch.randn(2 * columns, 64) * 0.1, torch.randn(64, columns) * 0.1
    biases = [torch.randn(2 * columns).to(dtype), torch.randn(64).to(dtype)] if biased else [None, None]
    x = torch.randn(100, 64).to(dtype)
    own = [filled(compiled, matrix, QUANTIZATION_NONE, dtype) for matrix in (gate_up, down)]
    plain = [filled(PLAIN, matrix.to(dtype), QUANTIZATION_NONE, torch.float32) for matrix in (gate_up, down)]
    found = compiled.feed_forward(x, *own, *biases)
    wanted = PLAIN.feed_forward(x.float(), *plain, *(None if bias is None else bias.float() for bias in biases))
    assert error(found, wanted) < TOLERANCE[dtype]
    assert torch.equal(compiled.feed_forward(x[9:10], *own, *biases), found[9:10])


def test_a_shard_without_columns_adds_nothing(compiled: CompiledKernels) -> None:
    gate_up, down = (compiled.empty_weight(shape, QUANTIZATION_NONE, torch.float32, CPU) for shape in ((4, 0, 64), (4, 64, 0)))
    x, chosen = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int32)
    assert torch.equal(compiled.experts(x, chosen, torch.ones(3, 1), gate_up, down), torch.zeros(3, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_activations_give_extremes_and_never_hide_a_nan(compiled: CompiledKernels, dtype: torch.dtype) -> None:
    gate_up, down = torch.cat((torch.eye(32), torch.eye(32))), torch.eye(32)
    own = [filled(compiled, matrix, QUANTIZATION_NONE, dtype) for matrix in (gate_up, down)]
    x = torch.linspace(-200, 200, 32)[None].to(dtype)
    wanted = torch.nn.functional.silu(x.float()) * x.float()
    torch.testing.assert_close(compiled.feed_forward(x, *own, None, None), wanted, rtol=1e-2, atol=1e-6)
    x[0, 5] = float("nan")
    found = compiled.feed_forward(x, *own, None, None)
    assert bool(found.isnan().any())


def heads(shape: tuple[int, int, int, int], clip: float, dtype: torch.dtype) -> HeadSpec:
    num_heads, num_kv_heads, dim, rotary = shape
    readers = tuple(head * num_kv_heads // num_heads for head in range(num_heads))
    frequencies = 1e4 ** -(torch.arange(rotary // 2) / max(1, rotary // 2))
    return HeadSpec(num_heads, num_kv_heads, dim, readers, dim**-0.5, 1e-6, clip, rotary, frequencies, 1.0, None, dtype)


def pools(spec: HeadSpec, slots: int, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (spec.num_kv_heads, slots, spec.head_dim)
    return torch.full(shape, fill, dtype=spec.dtype), torch.full(shape, fill, dtype=spec.dtype)


def spans(*parts: tuple[int, int, Sequence[int]]) -> list[Span]:
    """Of (position, rows, pages)."""
    found, first = [], 0
    for position, rows, pages in parts:
        found.append(Span(slice(first, first + rows), position, 1, pages, contiguous=False))
        first += rows
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "normed", "clip"),
    [((9, 3, 64, 64), True, 0.0), ((4, 4, 80, 40), False, 0.3), ((8, 1, 128, 128), True, 0.0), ((3, 2, 18, 0), True, 0.0)],
)
def test_attention_is_right_and_independent_of_chunks(
    compiled: CompiledKernels, shape: tuple[int, int, int, int], dtype: torch.dtype, clip: float, *, normed: bool
) -> None:
    spec, wide, page_tokens, length = heads(shape, clip, dtype), heads(shape, clip, torch.float32), 4, 1100
    num_pages = length // page_tokens
    pages = torch.randperm(num_pages + 20).tolist()
    qkv = torch.randn(length, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    norm = torch.rand(spec.num_heads + spec.num_kv_heads, spec.head_dim).to(dtype) if normed else None
    slots = len(pages) * page_tokens
    all_rows = spans((0, length, pages[:num_pages]))
    whole = compiled.begin(spec, all_rows, page_tokens)(qkv, norm, None, *pools(spec, slots, 0))
    wanted = PLAIN.begin(wide, all_rows, page_tokens)(qkv, None if norm is None else norm.float(), None, *pools(wide, slots, 0))
    assert error(whole, wanted) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    # What lies beyond a sequence's tokens, in its pages and in others, must not be looked at.
    keys, values = pools(spec, slots, float("nan"))
    position, parts = 0, []
    for rows in (1, 1, 30, 1, 500, 511, 1, 50, 5):
        step = compiled.begin(spec, spans((position, rows, pages[: -(-(position + rows) // page_tokens)])), page_tokens)
        parts.append(step(qkv[position : position + rows], norm, None, keys, values))
        position += rows
    assert torch.equal(torch.cat(parts), whole)


def test_sequences_of_one_step_do_not_see_each_other(compiled: CompiledKernels) -> None:
    spec = heads((6, 2, 32, 32), 0.0, torch.bfloat16)
    qkv = torch.randn(20, 10, 32)
    together = compiled.begin(spec, spans((0, 7, [3, 1]), (0, 13, [0, 2, 4, 5])), 4)(qkv, None, None, *pools(spec, 24, 0))
    first = compiled.begin(spec, spans((0, 7, [0, 1])), 4)(qkv[:7], None, None, *pools(spec, 24, 0))
    second = compiled.begin(spec, spans((0, 13, [5, 4, 3, 2])), 4)(qkv[7:], None, None, *pools(spec, 24, 0))
    assert torch.equal(together, torch.cat((first, second)))


@pytest.mark.parametrize("position", [3, 512])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_attention_never_hides_a_nan(compiled: CompiledKernels, clip: float, position: int) -> None:
    spec = heads((2, 1, 32, 32), clip, torch.float32)
    qkv = torch.randn(513, 4, 32)
    qkv[position, 2, 7] = float("nan")  # of its key; 512 begins a stretch
    found = compiled.begin(spec, spans((0, 513, range(129))), 4)(qkv, None, None, *pools(spec, 516, 0))
    assert not found[:position].isnan().any()
    assert found[position:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantization", "bits"), [(QUANTIZATION_INT8, INT8_BITS), (QUANTIZATION_INT4, INT4_BITS)])
def test_compiled_quantization_has_the_bits_of_torchs(quantization: Quantization, bits: int, dtype: torch.dtype) -> None:
    matrix = (torch.randn(99, 520) * torch.rand(99, 1) ** 6).to(dtype)
    matrix[3], matrix[5, :64], matrix[6, :32] = 0, 1, -2
    matrix[4] *= 1e-6
    values, scales = quantize(matrix, bits)
    kept = PLAIN.empty_weight((99, 520), quantization, torch.float32, CPU)
    assert isinstance(kept, GroupedWeight)
    kept.values.copy_(values)
    kept.scales.copy_(scales)
    # Rows of the unit matrix bring the weights themselves to light; float32 holds every one exactly.
    weight = CompiledKernels(2).empty_weight((99, 520), quantization, torch.float32, CPU)
    weight.store(0, matrix[:10])
    weight.store(10, matrix[10:])
    assert torch.equal(weight.matmul(torch.eye(520)).T, kept.dequantize(slice(None)))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_spoils_its_output(bad: float, quantization: Quantization) -> None:
    matrix = torch.randn(40, 96)
    matrix[7, 45] = bad
    found = filled(CompiledKernels(1), matrix, quantization, torch.float32).matmul(torch.ones(2, 96))
    assert torch.equal(found.isfinite(), (torch.arange(40) != 7).expand(2, 40))


def test_blocks_that_do_not_fit_a_weight_are_refused(compiled: CompiledKernels) -> None:
    weight = compiled.empty_weight((2, 3, 40), QUANTIZATION_INT8, torch.float32, CPU)
    for row, shape in ((0, (1, 39)), (5, (2, 40)), (-1, (1, 40))):
        with pytest.raises(ValueError, match=r"wanted \[n, 40\] within 6 rows"):
            weight.store(row, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"wanted \[rows, 40\], found \[2, 64\]"):
        weight.expert(0).matmul(torch.zeros(2, 64))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_and_lets_go_of_the_pool() -> None:
    kernels = CompiledKernels(2)
    weight, x = filled(kernels, torch.randn(300, 64), QUANTIZATION_NONE, torch.float32), torch.randn(3, 64)
    wanted = weight.matmul(x)
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends a child that waits for threads it does not have
        is_right = torch.equal(weight.matmul(x), wanted)
        del weight, kernels
        gc.collect()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_conversion_has_the_bits_of_torchs(dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 64) * 10.0 ** torch.randint(-8, 4, (20, 64))
    for source in DTYPES:
        weight = filled(CompiledKernels(1), matrix.to(source), QUANTIZATION_NONE, dtype)
        found = weight.matmul(torch.eye(64).to(dtype)).T
        torch.testing.assert_close(found, matrix.to(source).to(dtype).float(), rtol=0, atol=0)


def test_a_weight_of_other_kernels_is_refused(compiled: CompiledKernels) -> None:
    gate_up, down = (PLAIN.empty_weight(shape, QUANTIZATION_NONE, torch.float32, CPU) for shape in ((4, 2), (2, 2)))
    with pytest.raises(TypeError, match="a weight of other kernels: DenseWeight"):
        compiled.feed_forward(torch.randn(1, 2), gate_up, down, None, None)
