"""Streams of random tokens and their rates."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from coordinator.bench.load import Load, Prompts, make_request, run_load
from coordinator.client import GenerationClient
from protos.errors import InvalidArgument, MeshError, WorkerLost
from protos.generation_pb2 import Accepted, Delta, Finished, GenerateRequest, GenerateResponse

SECOND = 10**9


def load(*arrived_s: tuple[float, ...], prompt_tokens: int = 100) -> Load:
    return Load(0, prompt_tokens, tuple(tuple(round(moment * SECOND) for moment in times) for times in arrived_s))


def test_prompts_are_the_same_in_every_run_and_differ_from_each_other() -> None:
    drawn, again = Prompts(50), Prompts(50)
    first = drawn.draw(200)
    assert first == again.draw(200)
    assert first != drawn.draw(200)
    assert set(first) <= set(range(50))
    assert len(set(first)) > 25


def test_rates_of_one_stream() -> None:
    one = load((2, 2.5, 3, 4))
    assert one.prefill_per_s == 50
    assert one.decode_per_s == 1.5
    assert one.total_per_s == 1


def test_streams_decode_together_from_the_last_first_token_to_the_first_last_one() -> None:
    both = load((1, 2, 3, 4, 5), (3, 4, 5, 6, 7))
    assert both.prefill_per_s == pytest.approx(200 / 3)
    assert both.decode_per_s == 2
    assert both.total_per_s == pytest.approx(10 / 7)


def test_streams_that_never_decode_together_have_no_rate() -> None:
    with pytest.raises(InvalidArgument, match="ask for more --new-tokens"):
        _ = load((1, 2), (3, 4)).decode_per_s


def test_request_is_greedy_and_takes_no_end() -> None:
    request = make_request([5, 6], 7)
    assert request == GenerateRequest(token_ids={"ids": [5, 6]}, max_tokens=7, ignore_eos=True)  # type: ignore[arg-type]


class FakeClient:
    """Streams as many tokens as asked for, less `missing`."""

    def __init__(self, missing: int = 0, error: MeshError | None = None) -> None:
        self.missing, self.error = missing, error
        self.prompts: list[list[int]] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        self.prompts.append(list(request.token_ids.ids))
        yield GenerateResponse(accepted=Accepted())
        for token in range(request.max_tokens - self.missing):
            yield GenerateResponse(delta=Delta(token_ids=[token]))
        if self.error:
            raise self.error
        yield GenerateResponse(finished=Finished())


async def run(client: Any, new_tokens: int) -> Load:
    return await run_load(cast("GenerationClient", client), [[1, 2], [3, 4]], new_tokens)


async def test_each_token_of_each_stream_has_its_time() -> None:
    client = FakeClient()
    found = await run(client, 3)
    assert client.prompts == [[1, 2], [3, 4]]
    assert [len(times) for times in found.arrived_ns] == [3, 3]
    assert found.prompt_tokens == 2
    for times in found.arrived_ns:
        assert list(times) == sorted(times)
        assert times[0] > found.started_ns


async def test_a_stream_that_is_too_short_is_an_error() -> None:
    with pytest.raises(MeshError, match="asked for 3 tokens, 2 came"):
        await run(FakeClient(missing=1), 3)


async def test_an_error_of_a_stream_is_raised_by_itself() -> None:
    with pytest.raises(WorkerLost, match="gone"):
        await run(FakeClient(error=WorkerLost("gone")), 3)
