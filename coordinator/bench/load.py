"""Streams of random tokens through the public service, and the times at which their tokens came.

Times are the caller's: from sending a request to its first token, and from there to the last one. So they hold all that a caller
waits for: intake, scheduling and the way of a token through the private socket, not the mesh alone. The terminal message's
timings, which begin with the first step, would flatter.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import InvalidArgument, MeshError
from protos.generation_pb2 import GenerateRequest, TokenIds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.client import GenerationClient

SEED = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run."""

    prompt_tokens: int
    new_tokens: int
    """At least 2: the first one belongs to the prefill."""
    concurrency: int
    repeats: int


class Prompts:
    """Random token ids: the same ones in every run, others for every stream."""

    def __init__(self, vocabulary: int) -> None:
        """Start anew; ids are below `vocabulary`."""
        self._vocabulary = vocabulary
        self._random = random.Random(SEED)  # noqa: S311  # no secret

    def draw(self, num_tokens: int) -> list[int]:
        """Draw the next prompt."""
        return self._random.choices(range(self._vocabulary), k=num_tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that started at once; all times are `time.perf_counter_ns`."""

    started_ns: int
    prompt_tokens: int
    """Of each stream."""
    arrived_ns: tuple[tuple[int, ...], ...]
    """Of each token of each stream."""

    @property
    def prefill_per_s(self) -> float:
        """Prompt tokens of all streams, by the time until each had its first token."""
        last_first = max(times[0] for times in self.arrived_ns)
        return len(self.arrived_ns) * self.prompt_tokens * 1e9 / (last_first - self.started_ns)

    @property
    def decode_per_s(self) -> float:
        """Tokens that came while every stream decoded: after the last one's first and until the first one's last.

        For one stream: all but the first token, by the time from the first to the last one.

        Raises:
            InvalidArgument: one stream had ended when another began.

        """
        start = max(times[0] for times in self.arrived_ns)
        end = min(times[-1] for times in self.arrived_ns)
        count = sum(start < moment <= end for times in self.arrived_ns for moment in times)
        if end <= start:
            raise InvalidArgument("the first stream ended before the last one had a token: ask for more --new-tokens")
        return count * 1e9 / (end - start)

    @property
    def total_per_s(self) -> float:
        """Generated tokens of all streams, by the whole time, prefill included."""
        last = max(times[-1] for times in self.arrived_ns)
        return sum(map(len, self.arrived_ns)) * 1e9 / (last - self.started_ns)


def make_request(prompt: Sequence[int], new_tokens: int) -> GenerateRequest:
    """Ask for exactly `new_tokens` tokens, greedily."""
    return GenerateRequest(token_ids=TokenIds(ids=prompt), max_tokens=new_tokens, ignore_eos=True)


async def run_load(client: GenerationClient, prompts: Sequence[Sequence[int]], new_tokens: int) -> Load:
    """Run one stream for each prompt, all at once.

    Args:
        client: of the coordinator.
        prompts: of equal length.
        new_tokens: of each stream.

    Raises:
        MeshError: a stream failed or is not as long as asked for.

    """
    requests = [make_request(prompt, new_tokens) for prompt in prompts]
    started = time.perf_counter_ns()
    try:
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(_stream(client, request)) for request in requests]
    except* MeshError as errors:
        raise errors.exceptions[0] from None
    return Load(started, len(prompts[0]), tuple(stream.result() for stream in streams))


async def _stream(client: GenerationClient, request: GenerateRequest) -> tuple[int, ...]:
    arrived: list[int] = []
    async with aclosing(client.generate(request)) as responses:
        async for response in responses:
            if response.WhichOneof("event") == "delta":
                arrived += [time.perf_counter_ns()] * len(response.delta.token_ids)
    if len(arrived) != request.max_tokens:
        raise MeshError(f"asked for {request.max_tokens} tokens, {len(arrived)} came")
    return tuple(arrived)
