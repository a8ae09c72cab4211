"""What a coordinator asks of a worker besides rounds: plans that are almost right, folders that are none."""

from __future__ import annotations

import asyncio
import os
from random import Random
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import DecodeError

from protos.digest import shard_digest
from protos.errors import MeshError
from protos.plan_pb2 import LayerPlan, ShardPlan
from protos.rpc import PROTOCOL_VERSION
from protos.shardworker_pb2 import DescribeRequest, LoadRequest, ReleaseRequest, WarmRequest
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import TEXTS, WHOLE, mutate, mutate_bytes
from tests.fuzz.stack import Stack, Worker, load_request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Bench:
    """An own worker, which may hold anything at any time."""

    def __init__(self, stack: Stack, pipe: Path) -> None:
        self.stack, self.pipe = stack, pipe
        self.worker = Worker()
        self.examples = 0

    async def call(self, kind: str, request: Any) -> None:
        with watched():
            try:
                async with asyncio.timeout(10):
                    await self._answer(kind, request)
            except MeshError as error:
                sent[f"{kind}: {error.reason}"] += 1
                assert error.code in CODES, error
                assert 0 < len(str(error)) < 20_000
            else:
                sent[f"{kind}: served"] += 1

    async def _answer(self, kind: str, request: Any) -> None:
        context: Any = None
        if kind == "load":
            async for response in self.worker.service.Load(request, context):
                assert response.WhichOneof("event")
        else:
            await {
                "release": self.worker.service.Release,
                "warm": self.worker.service.Warm,
                "describe": self.worker.service.Describe,
            }[kind](request, context)

    async def check_next_is_served(self) -> None:
        """Now and then: a sound plan is loaded again."""
        self.examples += 1
        if self.examples % 20:
            return
        if self.worker.holding.assignment >= 2**62:
            # Nobody can go higher for ever: such a worker is started anew.
            assert self.worker.executor.close(5)
            self.worker = Worker()
        request = load_request(self.stack.plan, 0, self.stack.model.directory, self.worker.holding.assignment + 1)
        await self.worker.load(request)
        held = self.worker.holding.held()
        assert (held.plan_digest, held.shard) == (self.stack.plan.digest, 0)


@pytest.fixture(scope="module")
def bench(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    pipe = tmp_path_factory.mktemp("pipe")
    for file in stack.plan.shards[0].files:
        os.mkfifo(pipe / file.name)
    one = Bench(stack, pipe)
    yield one
    assert one.worker.executor.close(5)


def changed_plan(random: Random, plan: ShardPlan) -> ShardPlan:
    plan = ShardPlan.FromString(plan.SerializeToString())
    if random.random() < 0.3:
        plan.random_weights = True
        del plan.files[:]
    if random.random() < 0.4:
        resized(random, plan)
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        layer = random.choice(plan.layers or [LayerPlan()])
        mutate(
            random, random.choice((plan, plan.attention, plan.attention.rope, layer, layer.attention, layer.experts, plan.head))
        )
    return plan


def resized(random: Random, plan: ShardPlan) -> None:
    """Change a size wherever it stands: such a plan agrees with itself."""
    size = random.choice((0, 1, 2, 3, 33, 1000, 2**16, 2**20, 2**24, 2**24 + 1, 2**32 - 1))
    what = random.choice(("vocabulary", "columns", "experts", "page_tokens"))
    if what == "page_tokens":
        plan.page_tokens = size
    elif what == "vocabulary":
        plan.vocabulary.start, plan.vocabulary.end, plan.head.shape[0] = 0, size, size
        plan.head.ranges[0].CopyFrom(plan.vocabulary)
    for parts in (layer.experts for layer in plan.layers if layer.HasField("experts")):
        for part in (parts.gate, parts.up, parts.down):
            if what == "experts":
                part.num_experts = parts.num_experts = size
            elif what == "columns":
                at = 1 if part is parts.down else 0
                part.shape[at] = size
                part.ranges[at].start, part.ranges[at].end = 0, size


@fuzz(0.04)
def test_changed_plans_are_held_or_refused(bench: Bench, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    request = load_request(bench.stack.plan, 0, bench.stack.model.directory, bench.worker.holding.assignment + 1)
    plan = changed_plan(random, request.plan)
    request.plan.CopyFrom(plan)
    if random.random() < 0.3:
        request.directory = random.choice((*TEXTS, "/", "/dev", "/proc/self", "/etc", "a" * 5000, str(bench.pipe)))
    if random.random() < 0.2:
        mutate(random, request)
    if random.random() < 0.9 and plan.shard < len(request.shard_digests):
        request.shard_digests[plan.shard] = shard_digest(request.plan)
    if random.random() < 0.2:
        try:
            request = LoadRequest.FromString(mutate_bytes(random, request.SerializeToString()))
        except DecodeError:
            sent["load: no message"] += 1
            return
    # Otherwise one example would fence out all that follow.
    request.assignment = min(request.assignment, 2**62)
    runner.run(bench.call("load", request))
    runner.run(bench.check_next_is_served())


@fuzz(0.01)
def test_other_calls_are_served_or_refused(bench: Bench, runner: asyncio.Runner, number: int) -> None:
    random = Random(number)
    runner.run(bench.call("release", ReleaseRequest(assignment=random.choice((0, 1, bench.worker.holding.assignment, 2**62)))))
    warm = WarmRequest(
        protocol_version=random.choice((PROTOCOL_VERSION, PROTOCOL_VERSION, PROTOCOL_VERSION, *WHOLE[:5])),
        directory=random.choice((str(bench.stack.model.directory), str(bench.pipe), *TEXTS)),
        files=bench.stack.plan.shards[0].files,
    )
    if random.random() < 0.7:
        mutate(random, warm)
    runner.run(bench.call("warm", warm))
    runner.run(bench.call("describe", DescribeRequest()))
    runner.run(bench.check_next_is_served())
