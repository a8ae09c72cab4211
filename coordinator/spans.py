"""OpenTelemetry spans of sampled requests: request > step > round, and recoveries.

Of requests that are not sampled nothing is kept. Spans of steps and rounds are made when a step is over, with the times at which
it happened: between two rounds, where nothing else happens in a mesh, a round of a sampled step is put on a list and no more.

A step serves many requests. Each sampled one has a span of the step in its own trace, with what the rounds cost together; the
rounds stand below one of these spans, to which the others are linked. Attributes are OpenTelemetry's for generative AI where it
has one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from coordinator.microbatches import LIMIT
from coordinator.observer import Observer
from coordinator.span_attributes import OPERATION, Attributes, last_shard, request_attributes, round_attributes, step_attributes
from coordinator.trace_context import caller_trace, log_trace
from protos.errors import ERRORS

if TYPE_CHECKING:
    from collections.abc import Collection

    from opentelemetry.trace import Span, Tracer

    from coordinator.completion import Completion
    from coordinator.recovery import Recovery
    from coordinator.rounds import Round, RoundObservers
    from coordinator.scheduler import Rows, Step
    from coordinator.sequence import SequenceId
    from protos.errors import MeshError

STEPS_WITH_ROUNDS = 8
"""Steps of a request whose rounds have spans: the first ones, and again after it was interrupted or gave up its pages. Of a long
completion all rounds would be tens of thousands, which no collector keeps as one trace."""

_S = 1e9


@dataclass(slots=True, eq=False)
class _Traced:
    """A sampled request."""

    span: Span
    context: Context
    """Parent of its steps."""
    clock_ns: int
    """Unix time less `time.perf_counter_ns`: one for the whole trace, or a clock that is set would bend it."""
    steps_with_rounds: int = STEPS_WITH_ROUNDS
    """How many of the steps to come are to have them."""
    is_interrupted: bool = False

    def look_closer(self) -> None:
        """See the rounds of the next steps again."""
        self.steps_with_rounds = STEPS_WITH_ROUNDS


@dataclass(slots=True)
class _OpenStep:
    """A step in which sampled requests have rows."""

    step: Step
    number: int
    members: list[tuple[Rows, _Traced]]
    started_ns: int
    rounds: list[Round] = field(default_factory=list)
    drawn_ns: int = 0
    """When its first token was drawn; 0 until then. The requests that end by it end later."""


class Spans(Observer):
    """Makes spans of what the engine tells; all times are `time.perf_counter_ns` unless they say otherwise."""

    def __init__(self, tracer: Tracer, model: str, rounds: RoundObservers) -> None:
        """Start with nothing.

        Args:
            tracer: makes spans, and decides which requests are sampled.
            model: that is served, as given to `--model`.
            rounds: who hears of rounds; joined while a step has a sampled request.

        """
        self._tracer = tracer
        self._model = model
        self._rounds = rounds
        self._requests: dict[SequenceId, _Traced] = {}
        self._step: _OpenStep | None = None
        self._interrupted: list[SpanContext] = []

    def request_taken(self, completion: Completion) -> None:
        """Begin a request's span, if it is sampled."""
        clock_ns = time.time_ns() - time.perf_counter_ns()
        span = self._start_request(request_attributes(completion.sequence.request))
        if not span.is_recording():
            return
        if not caller_trace():
            log_trace(trace.format_trace_id(span.get_span_context().trace_id))
        self._requests[completion.sequence.id] = _Traced(span, trace.set_span_in_context(span, Context()), clock_ns)

    def request_refused(self, error: MeshError) -> None:
        """Make a span that has only an end."""
        span = self._start_request({})
        _fail(span, error.reason)
        span.end()

    def step_started(self, step: Step, number: int) -> None:
        """Listen to the rounds of a step that has a sampled request."""
        if not self._requests:
            return
        for identifier in step.released:
            # It is not over, and gave up its pages: for others, unless with all of a mesh.
            traced = self._requests.get(identifier)
            if traced and not traced.is_interrupted:
                traced.span.add_event("shardmesh.preempted")
                traced.look_closer()
        members = [(rows, traced) for rows in step.rows if (traced := self._requests.get(rows.sequence.id))]
        if members:
            self._step = _OpenStep(step, number, members, time.perf_counter_ns())
            self._rounds.append(self._step.rounds.append)

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        """Note a sampled request's first token, and the first one after an interruption."""
        if not self._requests:
            return
        if self._step and not self._step.drawn_ns:
            self._step.drawn_ns = time.perf_counter_ns()
        traced = self._requests.get(completion.sequence.id)
        if traced is None:
            return
        if len(completion.sequence.generated) == 1:
            traced.span.add_event("shardmesh.first_token")
            traced.span.set_attribute("gen_ai.response.time_to_first_chunk", pause_ns / _S)
        if traced.is_interrupted:
            traced.is_interrupted = False
            traced.span.add_event("shardmesh.resumed")

    def step_ended(self) -> None:
        """Make the spans of the step."""
        if self._step:
            self._end_step(self._step, is_broken=False)

    def requests_interrupted(self, identifiers: Collection[SequenceId]) -> None:
        """Make the spans of the step that broke, and note which requests wait for another mesh."""
        if self._step:
            self._end_step(self._step, is_broken=True)
        interrupted = [traced for identifier in identifiers if (traced := self._requests.get(identifier))]
        for traced in interrupted:
            traced.span.add_event("shardmesh.interrupted")
            traced.is_interrupted = True
            traced.look_closer()
        self._interrupted = [traced.span.get_span_context() for traced in interrupted]

    def recovery_ended(self, reason: str, recovery: Recovery) -> None:
        """Make the recovery's span, below the first of the sampled requests that it interrupted and linked to the others."""
        clock_ns = time.time_ns() - time.monotonic_ns()
        parents, self._interrupted = self._interrupted, []
        whole_ns = clock_ns + recovery.whole_ns
        tested_ns = whole_ns - recovery.canary_ns
        broken_ns = clock_ns + recovery.broken_ns
        span = self._tracer.start_span(
            "recovery" if reason else "reshard",
            _below(parents[0]) if parents else Context(),
            attributes={"error.type": reason, "shardmesh.failure": recovery.failure} if reason else None,
            links=[Link(parent) for parent in parents[1:]],
            start_time=broken_ns - recovery.detect_ns,
        )
        if span.is_recording():
            context = trace.set_span_in_context(span, Context())
            for part, start_ns, end_ns in (
                ("detect", broken_ns - recovery.detect_ns, broken_ns),
                ("assemble", tested_ns - recovery.assemble_ns, tested_ns),
                ("canary", tested_ns, whole_ns),
                ("replay", whole_ns, whole_ns + recovery.replay_ns),
            ):
                self._tracer.start_span(part, context, start_time=start_ns).end(end_ns)
        span.end(whole_ns + recovery.replay_ns)

    def completion_ended(self, completion: Completion) -> None:
        """End a request's span."""
        traced = self._requests.pop(completion.sequence.id, None)
        if traced is None:
            return
        span, outcome = traced.span, completion.outcome
        span.set_attribute("gen_ai.usage.output_tokens", len(completion.sequence.generated))
        if outcome in ERRORS:
            _fail(span, outcome)
        else:
            span.set_attribute("gen_ai.response.finish_reasons", [outcome])
        span.end(traced.clock_ns + time.perf_counter_ns())

    def _start_request(self, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            f"{OPERATION} {self._model}",
            # Not what is current in this process: only a caller is above a request.
            _caller_context(),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": OPERATION,
                "gen_ai.provider.name": "shardmesh",
                "gen_ai.request.model": self._model,
                **attributes,
            },
        )

    def _end_step(self, ended: _OpenStep, *, is_broken: bool) -> None:
        self._step = None
        self._rounds.remove(ended.rounds.append)
        ended_ns = ended.drawn_ns or time.perf_counter_ns()
        # A canary that tries another mesh meanwhile has steps of its own.
        rounds = [one for one in ended.rounds if 0 <= one.step - ended.number < LIMIT]
        shared = step_attributes(ended.step, ended.number, rounds)
        owner = next((traced for _, traced in ended.members if traced.steps_with_rounds), None)
        links: list[Link] = []
        for rows, traced in sorted(ended.members, key=lambda member: member[1] is not owner):
            span = self._tracer.start_span(
                "step",
                traced.context,
                attributes={**shared, "shardmesh.rows": rows.num_rows, "shardmesh.position": rows.position},
                links=links,
                start_time=ended.started_ns + traced.clock_ns,
            )
            if traced is owner:
                owner.steps_with_rounds -= 1
                links = [Link(span.get_span_context())]
                self._add_rounds(trace.set_span_in_context(span, Context()), rounds, traced.clock_ns)
            if is_broken:
                span.set_status(Status(StatusCode.ERROR, "no token of it was drawn"))
            span.end(ended_ns + traced.clock_ns)

    def _add_rounds(self, context: Context, rounds: list[Round], clock_ns: int) -> None:
        for one in rounds:
            span = self._tracer.start_span(
                one.action, context, attributes=round_attributes(one), start_time=one.started_ns + clock_ns
            )
            span.end(one.answers[last_shard(one)].received_ns + clock_ns)


def _below(parent: SpanContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _caller_context() -> Context:
    caller = caller_trace()
    if caller is None:
        return Context()
    return _below(
        SpanContext(int(caller.trace_id, 16), int(caller.span_id, 16), is_remote=True, trace_flags=TraceFlags(caller.flags))
    )


def _fail(span: Span, reason: str) -> None:
    # Without the error's text, which may quote what a caller sent.
    span.set_attribute("error.type", reason)
    span.set_status(Status(StatusCode.ERROR))
