"""The streams that run while things break, all that came of each, and what is wrong with it beside an undisturbed run."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos import rpc
from protos.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GetMeshRequest,
    GetMeshResponse,
    ReshardRequest,
    Sampling,
    TokenIds,
)
from protos.generation_pb2_grpc import GenerationStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Self

NEW_TOKENS = 32
LONG_PROMPT = 400
BATCH = 8
STREAM_S = 120.0
"""Longest that a stream may take, recovery included."""
SERVICE = "shardmesh.v1.Generation"


@dataclass(frozen=True)
class Stream:
    """What is asked for."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int = NEW_TOKENS
    sampling: dict[str, Any] = field(default_factory=dict)

    def request(self) -> GenerateRequest:
        """Make the message."""
        return GenerateRequest(
            request_id=self.name,
            token_ids=TokenIds(ids=self.prompt),
            sampling=Sampling(**self.sampling),
            max_tokens=self.max_tokens,
            ignore_eos=True,
        )


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple((7 * seed + 13 * column + column * column) % 250 + 3 for column in range(length))


SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
GREEDY_STREAM = Stream("greedy", _prompt(1, 5))
SEEDED_STREAM = Stream("seeded", _prompt(2, 9), sampling=SEEDED)
LONG_STREAM = Stream("long", _prompt(3, LONG_PROMPT), max_tokens=8)
"""With few rows a step its prompt is cut into so many chunks that it is read while all others decode."""
BATCH_STREAMS = tuple(
    Stream(
        f"batch-{number}",
        _prompt(10 + number, 1 + 3 * number),
        sampling={"temperature": 0.8, "seed": number} if number % 2 else {},
    )
    for number in range(BATCH)
)
ALL_STREAMS = (GREEDY_STREAM, SEEDED_STREAM, *BATCH_STREAMS, LONG_STREAM)
"""The four kinds: greedy, seeded, a batch, a long prefill."""


@dataclass
class Outcome:
    """All that came of one call."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the completion, as the terminal message counts them."""
    reason: int = 0
    """How it finished, a `FinishReason`."""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    error_reason: str = ""
    """Of the `ErrorInfo`."""
    retry_s: float | None = None
    """Of the `RetryInfo`."""
    disorder: list[str] = field(default_factory=list)
    """Messages that should not have come where they came."""
    arrived_s: list[float] = field(default_factory=list)
    """When each delta came, `time.monotonic`."""
    took_s: float = 0.0

    def add(self, response: GenerateResponse) -> None:
        """Take a message in."""
        kind = response.WhichOneof("event") or "nothing"
        if self.usage is not None:
            self.disorder.append(f"{kind} after the terminal message")
        if (kind == "accepted") != (not self.arrived_s):
            self.disorder.append(f"{kind} as message {len(self.arrived_s)}")
        self.arrived_s.append(time.monotonic())
        if kind == "delta":
            self.tokens += response.delta.token_ids
            self.text += response.delta.text
        elif kind == "finished":
            usage = response.finished.usage
            self.usage = (usage.prompt_tokens, usage.completion_tokens)
            self.reason = response.finished.reason

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        """Take the terminal status in."""
        self.code, self.details = error.code(), error.details() or ""
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                self.error_reason = info.reason
            elif detail.Unpack(retry):
                self.retry_s = retry.retry_delay.ToNanoseconds() / 1e9

    @property
    def longest_pause_s(self) -> float:
        """Between two messages."""
        return max((later - earlier for earlier, later in zip(self.arrived_s, self.arrived_s[1:], strict=False)), default=0.0)


def differences(stream: Stream, found: Outcome, expected: Outcome) -> list[str]:
    """Say everything that is wrong with a stream that should have ended as it did undisturbed."""
    wrong = [f"{stream.name}: {text}" for text in found.disorder]
    if found.code is not grpc.StatusCode.OK:
        return [*wrong, f"{stream.name}: {found.code.name} after {len(found.tokens)} tokens: {found.details}"]
    wrong += [
        f"{stream.name}: {what} {getattr(found, what)!r}, wanted {getattr(expected, what)!r}"
        for what in ("tokens", "text", "usage", "reason")
        if getattr(found, what) != getattr(expected, what)
    ]
    return wrong


def broken_differences(stream: Stream, found: Outcome, expected: Outcome, codes: Sequence[grpc.StatusCode]) -> list[str]:
    """Say everything that is wrong with a stream that may have been ended by an error: one status, the same tokens so far."""
    if found.code is grpc.StatusCode.OK:
        return differences(stream, found, expected)
    wrong = [f"{stream.name}: {text}" for text in found.disorder]
    if found.code not in codes or found.usage is not None:
        wrong.append(f"{stream.name}: {found.code.name} {found.details} (finished: {found.usage})")
    if found.tokens != expected.tokens[: len(found.tokens)] or not expected.text.startswith(found.text):
        wrong.append(f"{stream.name}: {found.tokens} is not how {expected.tokens} begins")
    return wrong


class Caller:
    """A channel to one coordinator that hides nothing of what comes."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None, *, stream_s: float = STREAM_S) -> None:
        """Make the channel.

        Args:
            address: of the coordinator.
            credentials: None: in plaintext.
            stream_s: longest that a stream may take, recovery included.

        """
        self._stream_s = stream_s
        options = rpc.channel_options(max_send_bytes=rpc.MAX_CALLER_BYTES, max_receive_bytes=rpc.MAX_CALLER_BYTES)
        self._channel = (
            grpc.aio.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.aio.insecure_channel(address, options=options)
        )
        self._stub = GenerationStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(self, stream: Stream, on_message: Callable[[Outcome], None] | None = None) -> Outcome:
        """Run one stream to its end, whatever that is; a call that outlives its time ends with DEADLINE_EXCEEDED."""
        outcome = Outcome()
        started_s = time.monotonic()
        try:
            async for response in self._stub.Generate(stream.request(), timeout=self._stream_s):
                outcome.add(response)
                if on_message:
                    on_message(outcome)
        except grpc.aio.AioRpcError as error:
            outcome.fail(error)
        outcome.took_s = time.monotonic() - started_s
        return outcome

    async def generate_all(
        self, streams: Sequence[Stream] = ALL_STREAMS, on_message: Callable[[Outcome], None] = lambda _: None
    ) -> dict[str, Outcome]:
        """Run streams side by side, taken in this order; outcomes by name."""
        running = []
        for stream in streams:
            taken = asyncio.Event()

            def note(outcome: Outcome, taken: asyncio.Event = taken) -> None:
                taken.set()
                on_message(outcome)

            task = asyncio.create_task(self.generate(stream, note))
            running.append(task)
            waiting = asyncio.create_task(taken.wait())
            # A call may end without a message.
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        outcomes = await asyncio.gather(*running)
        return {stream.name: outcome for stream, outcome in zip(streams, outcomes, strict=True)}

    def open(self, stream: Stream) -> AsyncIterator[GenerateResponse]:
        """Begin a call that whoever opened it reads, or cancels, or forgets."""
        call: AsyncIterator[GenerateResponse] = self._stub.Generate(stream.request(), timeout=self._stream_s)
        return call

    async def mesh(self, timeout_s: float = 15.0) -> GetMeshResponse:
        """Ask what the mesh is doing."""
        response: GetMeshResponse = await self._stub.GetMesh(GetMeshRequest(), timeout=timeout_s)
        return response

    async def reshard(self, num_shards: int, timeout_s: float = 15.0) -> None:
        """Ask for another number of shards; what is asked for is on its way then."""
        await self._stub.Reshard(ReshardRequest(num_shards=num_shards), timeout=timeout_s)

    async def serving(self, timeout_s: float = 5.0) -> bool:
        """Ask the health service; a coordinator that is not there does not serve."""
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            response = await self._health.Check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def __aenter__(self) -> Self:
        """Use as a context that closes the channel."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel."""
        await self._channel.close()
