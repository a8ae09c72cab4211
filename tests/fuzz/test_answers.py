"""Answers of workers that lie, as the coordinator reads them: a wrong sum is an error of the mesh and never one of the caller."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
from google.protobuf.message import DecodeError

from coordinator.planning.placement import WorkerReport, place
from coordinator.workers.assignment import choose_assignment
from protos.errors import InvalidArgument, MeshError
from protos.generation_pb2 import GenerateRequest, Sampling, TokenIds
from protos.shardworker_pb2 import DescribeRequest, DescribeResponse, ExecuteResponse
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import mutate, mutate_bytes
from tests.fuzz.stack import Serving, Stack

if TYPE_CHECKING:
    from collections.abc import Callable

REQUESTS = [
    GenerateRequest(token_ids=TokenIds(ids=[3, 5, 7]), max_tokens=2, sampling=sampling, logprobs=logprobs, ignore_eos=True)
    for sampling, logprobs in (
        (Sampling(), None),
        (Sampling(temperature=0.8, seed=1), 5),
        (Sampling(temperature=1.0, top_k=3, top_p=0.9, seed=1), None),
        (Sampling(temperature=1.0, min_p=0.1, seed=2), 2),
        (Sampling(presence_penalty=1.0), 2),
    )
]


def liar(random: Random, at: int, told: list[str]) -> Callable[[int, bytes], bytes]:
    """Change the answer number `at`, counted over all shards."""
    seen = 0

    def alter(shard: int, data: bytes) -> bytes:
        nonlocal seen
        del shard
        seen += 1
        if seen != at:
            return data
        if random.random() < 0.2:
            data = mutate_bytes(random, data)
            told.append("changed bytes")
            return data
        answer = ExecuteResponse.FromString(data)
        kind = answer.WhichOneof("result")
        told.append(str(kind))
        for _ in range(random.choice((1, 1, 2))):
            mutate(random, random.choice((answer, *([getattr(answer, kind)] * 4 if kind else []))))
        return answer.SerializeToString()

    return alter


@fuzz(0.015)
def test_changed_answers_are_summed_or_refused(stack: Stack, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    told: list[str] = []

    async def run() -> None:
        with watched():
            try:
                mesh = await stack.mesh(liar(random, random.randrange(1, 36), told))
            except MeshError:
                sent["answer to open: refused"] += 1
                return
            serving = Serving(stack, mesh)
            call = asyncio.ensure_future(serving.generate(random.choice(REQUESTS)))
            await asyncio.wait([call, serving.task], timeout=10, return_when=asyncio.FIRST_COMPLETED)
            assert call.done() or serving.task.done()
            error = serving.task.exception() if serving.task.done() else None
            assert error is not None or call.result()[-1].HasField("finished")
            for task in (call, serving.task):
                task.cancel()
            await asyncio.gather(call, serving.task, return_exceptions=True)
            mesh.fanout.close()
        what = told[0] if told else "none"
        sent[f"answer, {what}: {'taken' if error is None else 'refused'}"] += 1
        assert error is None or isinstance(error, MeshError), repr(error)
        # A fault may say anything; whatever else is wrong is the worker's doing, and no caller's.
        assert not isinstance(error, InvalidArgument) or what in {"changed bytes", "fault"}

    runner.run(run())


@pytest.fixture(scope="module")
def descriptions(stack: Stack, runner: asyncio.Runner) -> list[DescribeResponse]:
    async def describe() -> list[DescribeResponse]:
        return [await worker.service.Describe(DescribeRequest(), None) for worker in stack.workers]  # type: ignore[arg-type]

    return runner.run(describe())


@fuzz(0.02)
def test_changed_descriptions_are_placed_or_refused(stack: Stack, descriptions: list[DescribeResponse], number: int) -> None:
    random = Random(number)
    reports = []
    for shard, one in enumerate(descriptions):
        description = DescribeResponse.FromString(one.SerializeToString())
        try:
            if random.random() < 0.3:
                description = DescribeResponse.FromString(mutate_bytes(random, one.SerializeToString()))
        except DecodeError:
            sent["description: no message"] += 1
            return
        mutate(random, random.choice((description, description.held)))
        reports.append(WorkerReport(f"worker-{shard}", description))
    with watched():
        try:
            assignment = choose_assignment(stack.plan, place(stack.plan, reports), reports)
        except MeshError:
            sent["description: refused"] += 1
        else:
            sent["description: placed"] += 1
            assert 0 <= assignment < 2**64


def test_a_worker_that_has_seen_the_highest_assignment_is_refused(stack: Stack, descriptions: list[DescribeResponse]) -> None:
    reports = [
        WorkerReport(f"worker-{shard}", DescribeResponse.FromString(one.SerializeToString()))
        for shard, one in enumerate(descriptions)
    ]
    reports[1].description.held.assignment, reports[0].description.held.plan_digest = 2**64 - 1, b""
    with pytest.raises(MeshError, match="start it anew"):
        choose_assignment(stack.plan, place(stack.plan, reports), reports)
