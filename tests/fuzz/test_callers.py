"""What callers send, in every field and byte; chats and template arguments among it."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from protos.errors import MeshError
from protos.generation_pb2 import Chat, ChatMessage, GenerateRequest, Sampling, TokenIds
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import mutate, mutate_bytes
from tests.fuzz.stack import Serving, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACES = ("-00f067aa0ba902b7-01", "-0000000000000000-00", "-", "-00f067aa0ba902b7-01-\u202e", "")
CODES = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}


def sound_requests() -> list[GenerateRequest]:
    arguments = struct_pb2.Struct()
    arguments.update({"tools": [{"name": "f", "parameters": {"x": [1, 2.5, None, True]}}], "enable_thinking": False})
    messages = [ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="hällo 😀")]
    sampling = Sampling(
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.1,
        seed=7,
    )
    return [
        GenerateRequest(text="abc abd", max_tokens=3, stop=["zz"], logprobs=3),
        GenerateRequest(token_ids=TokenIds(ids=[3, 5, 7, 400]), max_tokens=3, stop_token_ids=[9, 11], ignore_eos=True),
        GenerateRequest(chat=Chat(messages=messages, template_arguments=arguments), sampling=sampling, request_id="mine"),
    ]


class Calls:
    """A service whose answers to a sound request never change."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.requests = sound_requests()
        self.tokens: list[int] = []
        self.examples = 0

    async def good_tokens(self) -> list[int]:
        responses = await self.serving.generate(self.requests[1])
        assert responses[-1].HasField("finished")
        return [token for response in responses for token in response.delta.token_ids]

    async def check_next_is_served(self) -> None:
        self.examples += 1
        if self.examples % 25 == 0:
            assert await self.good_tokens() == self.tokens
            assert self.serving.engine.scheduler.pool.num_used == 0


@pytest.fixture(scope="module")
def calls(stack: Stack, runner: asyncio.Runner) -> Iterator[Calls]:
    async def start() -> Calls:
        one = Calls(Serving(stack, await stack.mesh()))
        one.tokens = await one.good_tokens()
        return one

    one = runner.run(start())
    yield one
    one.serving.task.cancel()


@fuzz(0.03)
def test_changed_requests_are_served_or_refused(calls: Calls, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    request = GenerateRequest.FromString(random.choice(calls.requests).SerializeToString())
    if random.random() < 0.3:
        try:
            request = GenerateRequest.FromString(mutate_bytes(random, request.SerializeToString()))
        except DecodeError:
            sent["generate: no message"] += 1
            return
    else:
        for _ in range(random.choice((1, 1, 2, 4))):
            kind = request.WhichOneof("prompt")
            below = [request, request.sampling, *([getattr(request, kind)] if kind in {"chat", "token_ids"} else [])]
            mutate(random, random.choice(below))

    async def run() -> None:
        with watched():
            try:
                async with asyncio.timeout(10):
                    trace = "00-" + random.choice((random.randbytes(16).hex(), "0" * 32, "x" * 5000)) + random.choice(TRACES)
                    metadata = (
                        (random.choice(("traceparent", "tracestate", "x-bin")), random.choice((trace, "", "é", b"\xff"))),
                    )
                    responses = await calls.serving.generate(request, random.choice((1, 2, 3, 6)), metadata)
            except MeshError as error:
                sent[f"generate: {error.reason}"] += 1
                assert error.code in CODES, error
                assert 0 < len(str(error)) < 5000
            else:
                sent["generate: served"] += 1
                assert responses[0].HasField("accepted")
        await calls.check_next_is_served()

    runner.run(run())
