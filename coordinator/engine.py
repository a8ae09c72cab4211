"""The loop: schedule, forward, sample, emit. Knows token ids only, never text.

Requests outlive meshes: when a step fails, the loop ends with the error, and whoever runs it may rewind and run it again on
another mesh; every sequence is then replayed from its journal and goes on with the same tokens.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.microbatches import LIMIT
from coordinator.request import FinishReason, check_against_model
from coordinator.scheduler import Limits, Scheduler, Step
from coordinator.sequence import Sequence, SequenceId
from protos.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coordinator.forward import Forward
    from coordinator.head import Head
    from coordinator.request import Request
    from coordinator.sampler import Choice


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a completion went, nanoseconds."""

    queue_ns: int
    prefill_ns: int
    decode_ns: int


class Completion:
    """The tokens of one request, as they come."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        """Made by `Engine.submit`."""
        self.reason: FinishReason | None = None
        self._engine = engine
        self.sequence = sequence
        self._events: asyncio.Queue[Choice | FinishReason | MeshError] = asyncio.Queue()
        self._arrived_ns = time.monotonic_ns()
        self._started_ns = self._first_ns = self._last_ns = 0

    async def tokens(self) -> AsyncIterator[Choice]:
        """Yield each token; `reason` is set afterwards.

        Raises:
            MeshError: the completion cannot go on.

        """
        while True:
            event = await self._events.get()
            if isinstance(event, MeshError):
                # Many completions may share it: without this each raise would add to the last one's traceback.
                raise event.with_traceback(None)
            if isinstance(event, FinishReason):
                self.reason = event
                return
            yield event

    def cancel(self) -> None:
        """Stop the work before the next step. Idempotent."""
        self._engine.drop(self.sequence)

    @property
    def timings(self) -> Timings:
        """Times so far."""
        started = self._started_ns or time.monotonic_ns()
        first = self._first_ns or started
        return Timings(started - self._arrived_ns, first - started, max(0, self._last_ns - first))

    def start(self) -> None:
        """Note that the first rows are on their way."""
        self._started_ns = self._started_ns or time.monotonic_ns()

    def put(self, choice: Choice) -> None:
        """Pass a token on."""
        self._last_ns = time.monotonic_ns()
        self._first_ns = self._first_ns or self._last_ns
        self._events.put_nowait(choice)

    def end(self, event: FinishReason | MeshError) -> None:
        """Pass on that nothing follows."""
        self._events.put_nowait(event)


@dataclass(slots=True)
class Statistics:
    """Counters since start."""

    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine:
    """All requests of a coordinator."""

    def __init__(self, limits: Limits, vocabulary: int, context: int) -> None:
        """Start without requests.

        Args:
            limits: what the mesh was sized for.
            vocabulary: token ids are below it.
            context: most tokens of a sequence.

        """
        self.scheduler = Scheduler(limits)
        self.statistics = Statistics()
        self.max_tokens = min(context, limits.kv_tokens)
        self.refusal: MeshError | None = None
        """Why no requests are taken at present; None if they are."""
        self._vocabulary = vocabulary
        self._context = context
        self._completions: dict[SequenceId, Completion] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_id = 0

    def submit(self, request: Request) -> Completion:
        """Queue a request.

        Raises:
            InvalidArgument: token ids outside the vocabulary, or more tokens than the context has.
            OutOfMemory: it could never fit into the KV cache.
            QueueFull: too many wait already.
            MeshError: `refusal`, if there is one.

        """
        if self.refusal:
            raise self.refusal.with_traceback(None)
        check_against_model(request, self._vocabulary, self._context)
        self._last_id += 1
        sequence = Sequence(SequenceId(self._last_id), request)
        self.scheduler.add(sequence)
        completion = self._completions[sequence.id] = Completion(self, sequence)
        self.statistics.prompt_tokens += len(request.prompt)
        self._work.set()
        self._idle.clear()
        return completion

    async def run(self, forward: Forward, head: Head) -> None:
        """Do steps for ever.

        Raises:
            MeshError: a step failed; no token of it was drawn.

        """
        number = 0
        while True:
            await self._work.wait()
            step = self.scheduler.schedule()
            if step is None:
                self._work.clear()
                continue
            number += LIMIT
            for rows in step.rows:
                self._completions[rows.sequence.id].start()
            hidden = await forward.run(step, number)
            sequences = [rows.sequence for rows in step.rows if rows.samples]
            choices = await head.choose(hidden, sequences, number) if sequences else []
            self._finish_step(step, sequences, choices)

    def rewind(self) -> None:
        """Replay all running sequences in the next run: the workers may hold nothing any more."""
        self.scheduler.rewind()

    async def wait_idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    def fail(self, error: MeshError) -> None:
        """End all requests with an error."""
        for completion in list(self._completions.values()):
            self._end(completion, error)

    def drop(self, sequence: Sequence) -> None:
        """Forget a request whose caller is gone or has all that it wanted. Idempotent."""
        self.scheduler.finish(sequence)
        self._completions.pop(sequence.id, None)
        if not self._completions:
            self._idle.set()

    def _finish_step(self, step: Step, sequences: list[Sequence], choices: list[Choice]) -> None:
        """Write the journal first, then tell the callers."""
        drawn = {sequence.id: choice for sequence, choice in zip(sequences, choices, strict=True)}
        self.scheduler.advance(step, {identifier: choice.token for identifier, choice in drawn.items()})
        self.statistics.steps += 1
        for identifier, choice in drawn.items():
            # Dropped while the step was under way: nobody listens.
            if completion := self._completions.get(identifier):
                self.statistics.completion_tokens += 1
                self._emit(completion, choice)

    def _emit(self, completion: Completion, choice: Choice) -> None:
        completion.put(choice)
        sequence = completion.sequence
        if choice.token in sequence.request.stop_ids:
            self._end(completion, FinishReason.STOP)
        elif len(sequence.generated) >= sequence.request.max_tokens:
            self._end(completion, FinishReason.LENGTH)

    def _end(self, completion: Completion, event: FinishReason | MeshError) -> None:
        completion.end(event)
        completion.cancel()
