"""The loop: schedule, forward, sample, emit. Knows token ids only, never text.

Requests outlive meshes: when a step fails, the loop ends with the error, and whoever runs it may interrupt the requests and run
it again on another mesh; every sequence is then replayed from its journal and goes on with the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from coordinator.canary import Canary
from coordinator.completion import Completion
from coordinator.microbatches import LIMIT
from coordinator.observer import Observer
from coordinator.pages import PagePool
from coordinator.request import FinishReason, check_against_model
from coordinator.scheduler import Limits, Scheduler, Step
from coordinator.sequence import Sequence, SequenceId
from protos import rpc
from protos.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.forward import Forward
    from coordinator.head import Head
    from coordinator.request import Request
    from coordinator.sampler import Choice

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Statistics:
    """Counters since start."""

    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine:
    """All requests of a coordinator."""

    def __init__(self, limits: Limits, vocabulary: int, context: int, observer: Observer | None = None) -> None:
        """Start without requests.

        Args:
            limits: what the mesh was sized for.
            vocabulary: token ids are below it.
            context: most tokens of a sequence.
            observer: told of what happens; None: nobody.

        """
        self._observer = observer or Observer()
        self.scheduler = Scheduler(limits)
        self.statistics = Statistics()
        self.refusal: MeshError | None = None
        """Why no requests are taken at present; None if they are."""
        self.proven_ns = 0
        """When a token last came through the whole mesh, `time.monotonic_ns`; 0 before the first."""
        self.step_started_ns = 0
        """When the step that is under way began; 0 if none is."""
        self._vocabulary = vocabulary
        self._context = context
        self._canary = Canary(vocabulary, min(context, limits.kv_tokens), self._next_id)
        self._completions: dict[SequenceId, Completion] = {}
        self._num_arriving = 0
        # Requests that a broken mesh interrupted, until each has its next token; and who wants to know of the last one.
        self._interrupted: set[SequenceId] = set()
        self._when_resumed: Callable[[], None] = lambda: None
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_id = 0
        self._last_number = 0
        self._step: Step | None = None

    @property
    def max_tokens(self) -> int:
        """Most tokens of a request, prompt and completion together."""
        return min(self._context, self.scheduler.most_tokens)

    def expect(self, limits: Limits | None) -> bool:
        """Take only requests that fit into the next mesh too, from now until `move`; None: there will be no other one.

        Returns:
            Whether all that were taken before fit.

        """
        present = self.scheduler.limits.kv_tokens
        self.scheduler.most_tokens = min(present, limits.kv_tokens) if limits else present
        return self.scheduler.needed_tokens <= self.scheduler.most_tokens

    def move(self, limits: Limits, left: SequenceId) -> None:
        """Go on with a mesh that has proven itself, on which no request has begun yet.

        Args:
            limits: what it was sized for.
            left: see `prove_next`.

        Raises:
            ValueError: requests run on another mesh: they have to be interrupted first.

        """
        self.scheduler.resize(limits)
        self.scheduler.drop_kv(left)
        self.proven_ns = time.monotonic_ns()

    @contextlib.contextmanager
    def arrive(self) -> Iterator[None]:
        """Keep a place in the queue while a request is being read, which may take longer than to refuse it.

        Raises:
            QueueFull: too many wait already.
            MeshError: `refusal`, if there is one.

        """
        with self._telling_refusals():
            self._check_refusal()
            self.scheduler.check_room(self._num_arriving)
            self._num_arriving += 1
            try:
                yield
            finally:
                self._num_arriving -= 1

    def submit(self, request: Request) -> Completion:
        """Queue a request.

        Raises:
            InvalidArgument: token ids outside the vocabulary, or more tokens than the context has.
            OutOfMemory: it could never fit into the KV cache.
            QueueFull: too many wait already.
            MeshError: `refusal`, if there is one.

        """
        with self._telling_refusals():
            self._check_refusal()
            check_against_model(request, self._vocabulary, self._context)
            sequence = Sequence(self._next_id(), request)
            self.scheduler.add(sequence)
        completion = self._completions[sequence.id] = Completion(sequence, self.drop)
        self.statistics.prompt_tokens += len(request.prompt)
        self._observer.request_taken(completion)
        self._work.set()
        self._idle.clear()
        return completion

    async def prove_next(self, forward: Forward, head: Head, limits: Limits) -> SequenceId:
        """Send the canary through a mesh on which no step has been done, while steps may go on elsewhere.

        Returns:
            The sequence of which its workers hold keys and values now.

        Raises:
            MeshError: it did not come back, or not right.

        """
        pool = PagePool(limits.num_pages, limits.page_tokens)
        return await self._canary.check(forward, head, self._next_number, pool, released=())

    async def run(self, forward: Forward, head: Head) -> None:
        """Do steps for ever, and the canary's while there is nothing else to do.

        Raises:
            MeshError: a step failed; no token of it was drawn.

        """
        while True:
            step = self.scheduler.schedule()
            if step is None:
                self._work.clear()
                try:
                    async with asyncio.timeout(rpc.CANARY_S):
                        await self._work.wait()
                except TimeoutError:
                    await self._prove(forward, head)
                continue
            self._step, self.step_started_ns = step, time.monotonic_ns()
            number = self._next_number()
            self._observer.step_started(step, number)
            for rows in step.rows:
                self._completions[rows.sequence.id].start()
            hidden = await forward.run(step, number)
            sequences = [rows.sequence for rows in step.rows if rows.samples]
            choices = await head.choose(hidden, sequences, number) if sequences else []
            self._finish_step(step, sequences, choices)
            self._step, self.step_started_ns = None, 0
            self._observer.step_ended()

    def interrupt(self, error: MeshError | None, when_resumed: Callable[[], None]) -> None:
        """Note that the mesh is gone: all that ran is replayed on the next one, but for a request that broke mesh after mesh.

        Args:
            error: that ends such a request; None: the mesh is not broken, another one takes its place.
            when_resumed: called when every request that is replayed has its next token, or its end; at once if there is none.

        """
        if self._step and error:
            for guilty in self.scheduler.strike(self._step):
                if completion := self._completions.get(guilty.id):
                    log.error("request ended: it broke mesh after mesh", request_id=guilty.request.request_id, error=str(error))
                    self._end(completion, error)
        self._step, self.step_started_ns = None, 0
        # Those that an earlier mesh interrupted wait still, or again.
        self._interrupted |= {sequence.id for sequence in self.scheduler.running}
        self._observer.requests_interrupted(self._interrupted)
        self._when_resumed = when_resumed
        if not self._interrupted:
            when_resumed()
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
        if completion := self._completions.pop(sequence.id, None):
            self._observer.completion_ended(completion)
        self._note_resumed(sequence.id)
        if not self._completions:
            self._idle.set()

    @contextlib.contextmanager
    def _telling_refusals(self) -> Iterator[None]:
        try:
            yield
        except MeshError as error:
            self._observer.request_refused(error)
            raise

    def _check_refusal(self) -> None:
        if self.refusal:
            raise self.refusal.with_traceback(None)

    async def _prove(self, forward: Forward, head: Head) -> None:
        """Send the canary through the mesh while it is idle."""
        left = await self._canary.check(forward, head, self._next_number, self.scheduler.pool, self.scheduler.take_released())
        self.scheduler.drop_kv(left)
        self.proven_ns = time.monotonic_ns()

    def _next_id(self) -> SequenceId:
        self._last_id += 1
        return SequenceId(self._last_id)

    def _next_number(self) -> int:
        # It only has to rise within a mesh's sessions; parts of a step have numbers between.
        self._last_number += LIMIT
        return self._last_number

    def _note_resumed(self, identifier: SequenceId) -> None:
        if identifier in self._interrupted:
            self._interrupted.discard(identifier)
            if not self._interrupted:
                self._when_resumed()

    def _finish_step(self, step: Step, sequences: list[Sequence], choices: list[Choice]) -> None:
        """Write the journal first, then tell the callers."""
        drawn = {sequence.id: choice for sequence, choice in zip(sequences, choices, strict=True)}
        self.scheduler.advance(step, {identifier: choice.token for identifier, choice in drawn.items()})
        self.statistics.steps += 1
        if drawn:
            self.proven_ns = time.monotonic_ns()
        for identifier, choice in drawn.items():
            self._note_resumed(identifier)
            # Dropped while the step was under way: nobody listens.
            if completion := self._completions.get(identifier):
                self.statistics.completion_tokens += 1
                self._emit(completion, choice)

    def _emit(self, completion: Completion, choice: Choice) -> None:
        self._observer.token_drawn(completion, completion.put(choice))
        sequence = completion.sequence
        if choice.token in sequence.request.stop_ids:
            self._end(completion, FinishReason.STOP)
        elif len(sequence.generated) >= sequence.request.max_tokens:
            self._end(completion, FinishReason.LENGTH)

    def _end(self, completion: Completion, event: FinishReason | MeshError) -> None:
        completion.end(event)
        completion.cancel()
