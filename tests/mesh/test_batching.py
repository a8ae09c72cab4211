"""What else is in the batch changes nothing: concurrency, chunked prefill, preemption, cancelled neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from protos import generation_pb2
from protos.errors import OutOfMemory, QueueFull
from tests.mesh.conftest import Completed, MeshMaker

PROMPTS = [[(7 * row + 13 * column) % 500 + 3 for column in range(1 + 9 * row % 70)] for row in range(16)]
GREEDY: dict[str, float] = {}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_sixteen_at_once_get_the_tokens_each_gets_alone(
    mesh: MeshMaker, checkpoint: Path, sampling: dict[str, float]
) -> None:
    async with mesh(checkpoint, 2) as running:
        alone = [(await running.generate(prompt, 24, sampling=sampling)).tokens for prompt in PROMPTS]
        together = await asyncio.gather(*(running.generate(prompt, 24, sampling=sampling) for prompt in PROMPTS))
    assert [one.tokens for one in together] == alone
    assert len({tuple(tokens) for tokens in alone}) > 8, "the prompts must not all go the same way"


async def test_chunks_and_preemption_change_no_token(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 2) as running:
        expected = await asyncio.gather(*(running.generate(prompt, 60) for prompt in PROMPTS[:8]))
    # 10 pages of 16 tokens hold two or three of the sequences, 7 rows cut every prompt to pieces.
    async with mesh(checkpoint, 2, max_rows=7, max_running=7, kv_tokens=160) as running:
        squeezed = await asyncio.gather(*(running.generate(prompt, 60) for prompt in PROMPTS[:8]))
        load = (await running.client.mesh()).load
    assert [one.tokens for one in squeezed] == [one.tokens for one in expected]
    assert load.preemptions > 0, "the cache was meant to be too small"
    assert load.used_pages == 0


@pytest.mark.parametrize(
    ("dtype", "wire", "quantization"),
    [("f32", "f32", "none"), ("bf16", "bf16", "none"), ("bf16", "bf16", "int4"), ("f32", "int8", "int8")],
)
async def test_log_probabilities_have_the_same_bits_alone_together_and_in_pieces(
    mesh: MeshMaker, checkpoint: Path, dtype: str, wire: str, quantization: str
) -> None:
    arithmetic = {"dtype": dtype, "wire": wire, "quantization": quantization}

    def bits(completed: list[Completed]) -> list[list[float]]:
        return [[entry.chosen.logprob, *(other.logprob for other in entry.top)] for one in completed for entry in one.logprobs]

    async with mesh(checkpoint, 2, **arithmetic) as running:
        alone = [await running.generate(prompt, 48, logprobs=3) for prompt in PROMPTS[:8]]
        together = await asyncio.gather(*(running.generate(prompt, 48, logprobs=3) for prompt in PROMPTS[:8]))
    # Chunks of other sizes, and preempted sequences that are replayed: what was decoded comes back as part of a chunk.
    async with mesh(checkpoint, 2, max_rows=7, max_running=7, kv_tokens=160, **arithmetic) as running:
        pieces = await asyncio.gather(*(running.generate(prompt, 48, logprobs=3) for prompt in PROMPTS[:8]))
        assert (await running.client.mesh()).load.preemptions > 0
    assert bits(together) == bits(alone)
    assert bits(pieces) == bits(alone)


async def test_a_cancelled_neighbour_leaves_no_trace(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 2) as running:
        expected = (await running.generate(PROMPTS[3], 32)).tokens
        neighbours = [asyncio.create_task(running.generate(prompt, 400)) for prompt in PROMPTS[4:8]]
        stream = running.client.generate(
            generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPTS[3]), max_tokens=32, ignore_eos=True)
        )
        tokens: list[int] = []
        async for response in stream:
            tokens += response.delta.token_ids
            if len(tokens) == 8:
                for neighbour in neighbours:
                    neighbour.cancel()
        assert tokens == expected
        await asyncio.gather(*neighbours, return_exceptions=True)
        # Its own request proves that the loop went on and the cancelled ones' pages are free.
        assert (await running.generate(PROMPTS[3], 32)).tokens == expected
        load = (await running.client.mesh()).load
        assert (load.running, load.waiting, load.used_pages) == (0, 0, 0)


async def test_cancelling_stops_the_work_within_a_step(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1) as running:
        stream = running.client.generate(
            generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[5]), max_tokens=400, ignore_eos=True)
        )
        async for response in stream:
            if response.WhichOneof("event") == "delta":
                break
        await stream.aclose()
        engine = running.coordinator._status.engine  # type: ignore[union-attr]
        await asyncio.wait_for(engine.wait_idle(), 5)
        steps = engine.statistics.steps
        assert steps < 200
        await running.generate([5], 2)
        assert engine.statistics.steps <= steps + 1 + 2


async def test_a_deadline_ends_the_call_and_the_work(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1) as running:
        request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[5]), max_tokens=400, ignore_eos=True)
        call = running.client._stub.Generate(request, timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in call:
                pass
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        engine = running.coordinator._status.engine  # type: ignore[union-attr]
        await asyncio.wait_for(engine.wait_idle(), 5)


async def test_admission_queues_then_refuses(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1, max_running=2, max_waiting=3) as running:
        calls = [asyncio.create_task(running.generate([5 + number], 60)) for number in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        served = [result for result in results if not isinstance(result, BaseException)]
        assert len(refused) + len(served) == 12
        assert refused, "more than five requests were offered at once"
        assert "retry later" in str(refused[0])
        assert all(len(result.tokens) == 60 for result in served)


async def test_what_could_never_fit_is_refused(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1, kv_tokens=64) as running:
        with pytest.raises(OutOfMemory, match=r"up to 80 tokens of KV cache, the mesh has 64"):
            await running.generate([5] * 40, 40)
        # Without max_tokens the completion ends where the cache does.
        result = [
            response
            async for response in running.client.generate(
                generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[5] * 40), ignore_eos=True)
            )
        ]
        assert result[-1].finished.usage.completion_tokens == 24
        assert result[-1].finished.reason == generation_pb2.FINISH_REASON_LENGTH
