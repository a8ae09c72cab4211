from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from protos.plan_pb2 import QUANTIZATION_INT4
from shardworker.kernels.cuda import graphs as cuda_graphs
from shardworker.kernels.cuda.graphs import CudaRecorder, Graphs, Input, Recording
from shardworker.kernels.cuda.kernels import CudaKernels
from shardworker.kernels.interface import HeadSpec, Span

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
PAGE = 4


class FakeRecorder:
    """Replays by calling again what it was given, on the memory that it was given."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        self.recorded += 1
        output = torch.full_like(compute(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            output.copy_(compute())

        return Recording(replay, output)


class RefusingRecorder:
    """A device that cannot record."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        raise RuntimeError(f"operation not permitted when stream is capturing: {compute}")


@pytest.fixture
def recorder(kernels: CudaKernels) -> Any:
    return FakeRecorder() if kernels.device.type == "cpu" else CudaRecorder(kernels.device)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_inputs_are_read_anew_from_the_same_memory() -> None:
    recorder = FakeRecorder()
    graphs = Graphs(recorder, CPU)
    for number in range(3):
        x = torch.full((2, 3), float(number))
        assert torch.equal(graphs.run("key", [Input(x, 4)], doubled)[:2], x * 2)
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_another_key_room_or_dtype_is_another_recording() -> None:
    graphs = Graphs(FakeRecorder(), CPU)
    for key, room, dtype in (("a", 4, torch.float32), ("b", 4, torch.float32), ("a", 8, torch.float32), ("a", 4, torch.float64)):
        assert graphs.run(key, [Input(torch.ones(2, dtype=dtype), room)], doubled).tolist()[:3] == [2, 2, 0]
    assert len(graphs) == 4


def test_the_recording_least_used_makes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", 2)
    recorder = FakeRecorder()
    graphs = Graphs(recorder, CPU)
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.run(key, [Input(torch.ones(1), 1)], doubled)
    assert len(graphs) == 2
    assert recorder.recorded == 4


def test_what_cannot_be_recorded_is_computed() -> None:
    graphs = Graphs(RefusingRecorder(), CPU)
    for _ in range(2):
        assert graphs.run("key", [Input(torch.ones(1), 1)], doubled).tolist() == [2]
    assert len(graphs) == 0


def head_spec(device: torch.device) -> HeadSpec:
    frequencies = 1e4 ** (-torch.arange(8, device=device) / 8)
    return HeadSpec(4, 2, 16, (0, 0, 1, 1), 0.25, 1e-5, 0.0, 16, frequencies, 1.0, None, torch.float32)


def decoding(*tokens: int) -> list[Span]:
    spans, free = [], list(range(40))
    for row, held in enumerate(tokens):
        pages = tuple(free.pop() for _ in range(held // PAGE + 1))
        spans.append(Span(slice(row, row + 1), held, 1, pages, contiguous=False))
    return spans


def test_recorded_attention_has_the_bits_of_launched_attention(kernels: CudaKernels, recorder: Any) -> None:
    plain, recorded = CudaKernels(kernels.device, FakeRecorder()), CudaKernels(kernels.device, recorder)
    plain._graphs = None
    heads = head_spec(kernels.device)
    pool = torch.randn(2, 2, 2, 160, 16, device=kernels.device)
    other = pool.clone()
    norm = torch.rand(6, 16, device=kernels.device)
    for tokens in ((3, 9, 1), (4, 10, 2), (30,), (5, 11, 3, 0)):
        steps = [k.begin(heads, decoding(*tokens), PAGE) for k in (plain, recorded)]
        for layer in range(2):
            qkv = torch.randn(len(tokens), 8, 16, device=kernels.device)
            squares = torch.rand(len(tokens), 6, device=kernels.device)
            found = steps[1](qkv, norm, squares, *other[layer])
            assert torch.equal(found, steps[0](qkv, norm, squares, *pool[layer]))
    assert torch.equal(other, pool)


def test_two_open_steps_keep_their_own_tables(kernels: CudaKernels, recorder: Any) -> None:
    plain, recorded = CudaKernels(kernels.device, FakeRecorder()), CudaKernels(kernels.device, recorder)
    plain._graphs = None
    heads = head_spec(kernels.device)
    pool = torch.randn(2, 2, 160, 16, device=kernels.device)
    qkv = torch.randn(2, 8, 16, device=kernels.device)
    first, second = decoding(3, 9), decoding(20, 2)
    held = [recorded.begin(heads, spans, PAGE) for spans in (first, second)]
    for spans, step in ((second, held[1]), (first, held[0])):
        wanted_pool, found_pool = pool.clone(), pool
        wanted = plain.begin(heads, spans, PAGE)(qkv, None, None, *wanted_pool)
        assert torch.equal(step(qkv, None, None, *found_pool), wanted)
        assert torch.equal(found_pool, wanted_pool)


def test_a_finished_step_leaves_its_tables_to_the_next(kernels: CudaKernels) -> None:
    recorder = FakeRecorder()
    recorded = CudaKernels(kernels.device, recorder)
    heads = head_spec(kernels.device)
    pool = torch.randn(2, 2, 160, 16, device=kernels.device)
    for position in range(4):
        step = recorded.begin(heads, decoding(position, position + 8), PAGE)
        step(torch.randn(2, 8, 16, device=kernels.device), None, None, *pool)
        del step
        gc.collect()
    assert (recorder.recorded, recorder.replayed) == (1, 4)


def test_prompts_are_not_recorded(kernels: CudaKernels) -> None:
    recorder = FakeRecorder()
    recorded = CudaKernels(kernels.device, recorder)
    pool = torch.randn(2, 2, 160, 16, device=kernels.device)
    step = recorded.begin(head_spec(kernels.device), [Span(slice(0, 3), 0, 3, (4,), contiguous=True)], PAGE)
    step(torch.randn(3, 8, 16, device=kernels.device), None, None, *pool)
    assert recorder.recorded == 0


def test_recorded_experts_have_the_bits_of_launched_experts(kernels: CudaKernels, recorder: Any) -> None:
    plain, recorded = CudaKernels(kernels.device, FakeRecorder()), CudaKernels(kernels.device, recorder)
    plain._graphs = None
    pair = []
    for shape in ((5, 64, 40), (5, 40, 32)):
        weight = plain.empty_weight(shape, QUANTIZATION_INT4, torch.float32, kernels.device)
        weight.store(0, torch.randn(shape[0] * shape[1], shape[2]))
        pair.append(weight)
    for rows in (1, 3, 4, 2, 3):
        x = torch.randn(rows, 40, device=kernels.device)
        chosen, weights = torch.stack([torch.randperm(5)[:2] for _ in range(rows)]), torch.rand(rows, 2)
        found, wanted = (k.experts(x, chosen, weights, *pair) for k in (recorded, plain))
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_cuda_graphs_replay() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cuda", 0)), torch.device("cuda", 0))
    for number in range(3):
        x = torch.full((2, 3), float(number), device="cuda")
        assert torch.equal(graphs.run("key", [Input(x, 4)], doubled)[:2], x * 2)
    assert len(graphs) == 1
