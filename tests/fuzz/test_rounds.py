"""Rounds of a session, recorded and then changed, on real workers with their compiled kernels."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch
from google.protobuf.message import DecodeError

from protos import tensor_pb2
from protos.errors import ERRORS
from protos.generation_pb2 import GenerateRequest, Sampling, TokenIds
from protos.rpc import PROTOCOL_VERSION
from protos.shardworker_pb2 import Attend, Batch, ExecuteRequest, ExecuteResponse, Open, Project, SequenceRows
from protos.tensors import encode
from shardworker.service import ExecuteStream
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import WHOLE, mutate, mutate_bytes
from tests.fuzz.stack import NUM_PAGES, PAGE_TOKENS, Serving, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

CODES = {3, 8, 9, 10}
"""INVALID_ARGUMENT, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED."""


NUMBERS = [number for number in WHOLE if number < 2**32]


class Recorded:
    """A sound session of shard 0, and what it must answer for ever."""

    def __init__(self, stack: Stack, requests: list[bytes]) -> None:
        self.stack, self.requests = stack, requests
        self.answers: list[bytes] = []
        self.examples = 0


def plain(answer: ExecuteResponse) -> bytes:
    """Without times and without what every session has of its own."""
    copy = ExecuteResponse()
    copy.CopyFrom(answer)
    for name in ("compute_ns", "queue_ns", "epoch", "round"):
        copy.ClearField(name)
    return copy.SerializeToString()


@pytest.fixture(scope="module")
def recorded(stack: Stack, runner: asyncio.Runner) -> Recorded:
    async def record() -> Recorded:
        mesh = await stack.mesh()
        for shard in stack.kept:
            shard.clear()
        serving = Serving(stack, mesh)
        token_ids = TokenIds(ids=range(40, 55))
        calls = [
            GenerateRequest(token_ids=token_ids, max_tokens=4, ignore_eos=True),
            GenerateRequest(token_ids=token_ids, max_tokens=3, sampling=Sampling(temperature=0.8, seed=1), ignore_eos=True),
            GenerateRequest(token_ids=token_ids, max_tokens=2, sampling=Sampling(presence_penalty=1.0), ignore_eos=True),
        ]
        await asyncio.gather(*(serving.generate(call) for call in calls))
        serving.task.cancel()
        mesh.fanout.close()
        one = Recorded(stack, list(stack.kept[0]))
        one.answers = [plain(answer) for answer in await replay(one)]
        return one

    return runner.run(record())


class Talk:
    """One session; its requests are numbered and fenced as they leave."""

    def __init__(self, stack: Stack) -> None:
        stack.epoch += 1
        self.stack, self.epoch, self.round = stack, stack.epoch, 0
        self.stream = ExecuteStream(stack.workers[0].holding)

    async def ask(self, request: ExecuteRequest) -> ExecuteResponse:
        self.round += 1
        return await self.stream.answer(request)

    def fence(self, request: ExecuteRequest) -> None:
        request.plan_digest, request.epoch, request.round = self.stack.plan.digest, self.epoch, self.round + 1

    async def open(self) -> None:
        request = ExecuteRequest(open=Open(protocol_version=PROTOCOL_VERSION, num_pages=NUM_PAGES, coordinator=bytes(16)))
        self.fence(request)
        assert (await self.ask(request)).WhichOneof("result") == "opened"


async def replay(recorded: Recorded) -> list[ExecuteResponse]:
    talk = Talk(recorded.stack)
    await talk.open()
    answers = []
    for data in recorded.requests:
        request = ExecuteRequest.FromString(data)
        talk.fence(request)
        answers.append(await talk.ask(request))
    talk.stream.close()
    return answers


async def check_next_is_served(recorded: Recorded) -> None:
    """Now and then: the sound session gives the same bytes as before."""
    recorded.examples += 1
    if recorded.examples % 40 == 0:
        assert [plain(answer) for answer in await replay(recorded)] == recorded.answers


def check(answer: ExecuteResponse, kind: str) -> None:
    result = answer.WhichOneof("result")
    sent[f"round, {kind}: {answer.fault.reason if result == 'fault' else 'served'}"] += 1
    assert result is not None
    if result == "fault":
        assert answer.fault.code in CODES, answer.fault
        assert answer.fault.reason in ERRORS
        assert 0 < len(answer.fault.message) < 2000


def changed(random: Random, data: bytes) -> ExecuteRequest | None:
    if random.random() < 0.2:
        try:
            return ExecuteRequest.FromString(mutate_bytes(random, data))
        except DecodeError:
            sent["round, changed bytes: no message"] += 1
            return None
    request = ExecuteRequest.FromString(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        below = [request, *(getattr(request, name.name) for name, _ in request.ListFields() if name.message_type)]
        mutate(random, random.choice(below))
    return request


@fuzz(0.3, messages=10)
def test_changed_rounds_are_served_or_refused(recorded: Recorded, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)

    async def run() -> None:
        talk = Talk(recorded.stack)
        if random.random() < 0.95:
            await talk.open()
        start = random.choice((0, 0, random.randrange(len(recorded.requests))))
        for data in recorded.requests[start : start + 10]:
            request = changed(random, data) if random.random() < 0.6 else ExecuteRequest.FromString(data)
            if request is None:
                continue
            if random.random() < 0.9:
                talk.fence(request)
            with watched():
                check(await talk.ask(request), "changed")
        talk.stream.close()
        await check_next_is_served(recorded)

    runner.run(run())


def pages(random: Random, count: int) -> list[int]:
    kind = random.randrange(8)
    if kind == 0:
        return [random.choice(NUMBERS) for _ in range(min(count, 64))]
    if kind == 1:
        return [random.randrange(NUM_PAGES)] * min(count, 64)
    return random.sample(range(NUM_PAGES), min(max(0, count), NUM_PAGES))


def hostile_batches(random: Random) -> Iterator[tuple[Batch, int]]:
    """Batches that mostly fit what the session holds, and the rows that they speak of."""
    held: dict[int, int] = {}
    while True:
        batch, rows = Batch(), 0
        for _ in range(random.choice((1, 1, 2, 3))):
            sequence = random.choice((1, 2, 3, random.choice(WHOLE)))
            position = min(2**32 - 1, random.choice((0, held.get(sequence, 0), held.get(sequence, 0), random.choice(NUMBERS))))
            count = random.choice((1, 1, 2, 5, 17, random.choice(NUMBERS)))
            new = -(-(position + count) // PAGE_TOKENS) - -(-position // PAGE_TOKENS)
            held[sequence] = position + count
            rows += count
            batch.sequences.add(
                sequence=sequence,
                position=position,
                num_rows=count,
                pages=pages(random, new + random.choice((0, 0, 0, 0, 1, -1))),
                prompt_tokens=random.choice((1, 1, random.choice(NUMBERS))),
            )
        if random.random() < 0.2:
            gone = random.choice((1, 2, 3, random.choice(WHOLE)))
            held.pop(gone, None)
            batch.released.append(gone)
        yield batch, rows


@fuzz(0.3, messages=12)
def test_hostile_batches_are_served_or_refused(recorded: Recorded, runner: asyncio.Runner, number: int) -> None:
    """Positions, pages and rows that go to compiled code as they are, once they are found sound."""
    random = Random(number)
    spec = recorded.stack.model.spec
    full = any(ExecuteRequest.FromString(data).HasField("project") for data in recorded.requests)

    async def run() -> None:
        talk = Talk(recorded.stack)
        await talk.open()
        batches = hostile_batches(random)
        for step in range(1, 5):
            batch, rows = next(batches)
            rows = rows if rows < 500 else 3
            hidden = encode(torch.randn(rows, spec.hidden) * random.choice((1.0, 1e30, float("nan"))), tensor_pb2.DTYPE_F32)
            for layer in range(spec.num_layers):
                named = step if random.random() < 0.9 else random.choice(WHOLE)
                attend = ExecuteRequest(step=named, attend=Attend(layer=layer, hidden=hidden))
                project = ExecuteRequest(step=named, project=Project(layer=layer, hidden=hidden))
                squares = encode(torch.rand(rows, 2) * 100, tensor_pb2.DTYPE_F32)
                requests = (
                    [project, ExecuteRequest(step=named, attend=Attend(layer=layer, squares=squares))] if full else [attend]
                )
                if layer == 0:
                    requests[0].batch.CopyFrom(batch)
                for request in requests:
                    talk.fence(request)
                    with watched():
                        answer = await talk.ask(request)
                    check(answer, "hostile batch")
                if answer.HasField("fault"):
                    break
        talk.stream.close()
        await check_next_is_served(recorded)

    runner.run(run())


def test_sequence_rows_are_what_the_batches_above_are_made_of() -> None:
    """A field that is added must be fuzzed too."""
    assert {name.name for name in SequenceRows.DESCRIPTOR.fields} == {
        "sequence",
        "position",
        "num_rows",
        "pages",
        "prompt_tokens",
    }
