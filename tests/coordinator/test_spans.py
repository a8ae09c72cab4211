"""Spans of sampled requests by the real SDK, kept in memory; the engine is real, its model says what it is told."""

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import StatusCode

from coordinator.completion import Completion
from coordinator.engine import Engine
from coordinator.recovery import Recoveries, Recovery
from coordinator.request import Request
from coordinator.rounds import Answer, Round, RoundObservers
from coordinator.sampler import Choice
from coordinator.scheduler import Limits, Step
from coordinator.sequence import Sequence
from coordinator.spans import STEPS_WITH_ROUNDS, Spans
from coordinator.trace_context import bind_trace
from protos.errors import InvalidArgument, MeshError, WorkerLost

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROUNDS = (("attend", 0), ("feed_forward", 0), ("head", None))
WORKERS = ("a:1", "b:1")
ENOUGH = Limits(num_pages=1000, page_tokens=4)


class Scene:
    """An engine whose spans are kept, and a mesh of two workers that breaks when it is told to."""

    def __init__(self, sampler: Sampler, limits: Limits) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.rounds = RoundObservers()
        self.spans = Spans(provider.get_tracer("test"), "tiny", self.rounds)
        self.engine = Engine(limits, vocabulary=100, context=1000, observer=self.spans)
        self.recoveries = Recoveries(on_end=self.spans.recovery_ended)
        self.breaks = False
        self.during: Callable[[Step], None] = lambda _: None

    async def run(self, step: Step, number: int) -> torch.Tensor:
        await asyncio.sleep(0)
        for action, layer in ROUNDS[:-1]:
            self._answer(action, layer, number, step.num_rows)
        # A canary on another mesh, meanwhile.
        self._answer("attend", 0, number + 1000, 1)
        self.during(step)
        if self.breaks:
            raise WorkerLost("worker b:1 died", shards=(1,))
        return torch.zeros(sum(rows.samples for rows in step.rows), 1)

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        self._answer("head", None, step, len(hidden))
        return [Choice(7) for _ in sequences]

    def _answer(self, action: str, layer: int | None, number: int, rows: int) -> None:
        if self.rounds:
            now = time.perf_counter_ns()
            answers = (Answer(1000, 10, now + 9000, 50, now + 3000), Answer(2000, 20, now + 9000, 60, now + 5000))
            self.rounds(Round(action, layer, number, rows, now, now + 1, 100, answers, WORKERS, b""))

    def submit(self, request: Request, *traceparent: str) -> Completion:
        """Take a request in the context of a call."""
        context: Any = SimpleNamespace(invocation_metadata=lambda: tuple(("traceparent", value) for value in traceparent))

        def call() -> Completion:
            bind_trace(context)
            completion = self.engine.submit(request)
            self.logged = structlog.contextvars.get_contextvars().get("trace_id")
            return completion

        return contextvars.copy_context().run(call)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.engine.run(self, self))  # type: ignore[arg-type]
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def finish(self) -> None:
        async with self.running():
            await asyncio.wait_for(self.engine.wait_idle(), 10)
            # The step that drew the last tokens is over by the next turn of the loop.
            await asyncio.sleep(0)

    def named(self, prefix: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(prefix)]


def scene(sampler: Sampler = ALWAYS_ON, limits: Limits = ENOUGH) -> Scene:
    return Scene(sampler, limits)


def span_id(span: ReadableSpan) -> int:
    return span.get_span_context().span_id


def parent_id(span: ReadableSpan) -> int:
    assert span.parent
    return span.parent.span_id


def events(span: ReadableSpan) -> list[str]:
    return [event.name.removeprefix("shardmesh.") for event in span.events]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_request_step_and_round_stand_below_each_other_and_below_the_caller() -> None:
    here = scene(ParentBased(ALWAYS_OFF))
    here.submit(Request("r-1", (1, 2, 3), 2), f"00-{TRACE}-{SPAN}-01")
    await here.finish()
    (request,) = here.named("text_completion tiny")
    assert request.parent
    assert (request.parent.trace_id, request.parent.span_id, request.parent.is_remote) == (int(TRACE, 16), int(SPAN, 16), True)
    assert events(request) == ["first_token"]
    said = attributes(request)
    assert said["gen_ai.request.model"] == "tiny"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (3, 2)
    assert (said["gen_ai.response.id"], said["gen_ai.response.finish_reasons"]) == ("r-1", ("length",))
    assert 0 < said["gen_ai.response.time_to_first_chunk"] < 10
    first, second = here.named("step")
    assert {parent_id(first), parent_id(second)} == {span_id(request)}
    assert [attributes(step)["shardmesh.phase"] for step in (first, second)] == ["prefill", "decode"]
    assert [attributes(step)["shardmesh.position"] for step in (first, second)] == [0, 3]
    # The canary's is another mesh's.
    assert attributes(first)["shardmesh.rounds"] == len(ROUNDS)
    assert attributes(first)["shardmesh.slowest.compute_seconds"] == pytest.approx(len(ROUNDS) * 2e-6)
    assert attributes(first)["shardmesh.slowest.wire_seconds"] == pytest.approx(len(ROUNDS) * 2.98e-6)
    rounds = [span for span in here.exporter.get_finished_spans() if span.parent and parent_id(span) == span_id(first)]
    assert [(span.name, attributes(span).get("shardmesh.layer")) for span in rounds] == list(ROUNDS)
    said = attributes(rounds[0])
    assert (said["shardmesh.slowest.shard"], said["shardmesh.slowest.worker"]) == (1, "b:1")
    assert (said["shardmesh.request_bytes"], said["shardmesh.response_bytes"]) == (100, 110)
    assert sum(said[f"shardmesh.slowest.{part}_seconds"] for part in ("compute", "queue", "wire")) == pytest.approx(5e-6)
    assert len(here.exporter.get_finished_spans()) == 1 + 2 + 2 * len(ROUNDS)
    assert {span.get_span_context().trace_id for span in here.exporter.get_finished_spans()} == {int(TRACE, 16)}


async def test_what_is_below_happens_within_what_is_above() -> None:
    here = scene()
    here.submit(Request("r", (1, 2, 3), 3))
    await here.finish()
    spans = {span_id(span): span for span in here.exporter.get_finished_spans()}
    checked = 0
    for span in here.named("step"):
        above = spans[parent_id(span)]
        assert above.start_time <= span.start_time <= span.end_time <= above.end_time  # type: ignore[operator]
        checked += 1
    assert checked == 3


@pytest.mark.parametrize("traceparent", [(), (f"00-{TRACE}-{SPAN}-00",)], ids=["no caller", "a caller that keeps nothing"])
async def test_nothing_is_kept_of_a_request_that_is_not_sampled(traceparent: tuple[str, ...]) -> None:
    here = scene(ParentBased(ALWAYS_OFF))
    heard: list[bool] = []
    here.during = lambda _: heard.append(bool(here.rounds))
    here.submit(Request("r", (1, 2), 3), *traceparent)
    await here.finish()
    assert heard == [False] * 3
    assert here.exporter.get_finished_spans() == ()


async def test_no_round_is_listened_to_in_a_step_without_a_sampled_request() -> None:
    here = scene(ParentBased(ALWAYS_OFF))
    heard: list[bool] = []
    here.during = lambda _: heard.append(bool(here.rounds))
    here.submit(Request("plain", (1,), 6))
    here.submit(Request("sampled", (2,), 2), f"00-{TRACE}-{SPAN}-01")
    await here.finish()
    assert heard == [True, True, False, False, False, False]
    assert here.rounds == []


async def test_requests_of_one_step_have_a_span_each_and_its_rounds_once() -> None:
    here = scene()
    here.submit(Request("a", (1, 2), 1))
    here.submit(Request("b", (3,), 1))
    await here.finish()
    requests = {attributes(span)["gen_ai.response.id"]: span for span in here.named("text_completion")}
    first, second = here.named("step")
    assert parent_id(first) == span_id(requests["a"])
    assert parent_id(second) == span_id(requests["b"])
    assert [link.context.span_id for link in second.links] == [span_id(first)]
    assert (attributes(first)["shardmesh.rows"], attributes(second)["shardmesh.rows"]) == (2, 1)
    for step in (first, second):
        assert (attributes(step)["shardmesh.step.requests"], attributes(step)["shardmesh.step.rows"]) == (2, 3)
    assert len({requests[name].get_span_context().trace_id for name in "ab"}) == 2
    (head,) = here.named("head")
    assert parent_id(head) == span_id(first)


async def test_of_a_long_completion_only_the_first_steps_have_their_rounds() -> None:
    here = scene()
    here.submit(Request("r", (1,), STEPS_WITH_ROUNDS + 5))
    await here.finish()
    assert len(here.named("step")) == STEPS_WITH_ROUNDS + 5
    assert len(here.named("head")) == STEPS_WITH_ROUNDS
    assert {attributes(step)["shardmesh.rounds"] for step in here.named("step")} == {len(ROUNDS)}


async def test_a_recovery_stands_below_a_request_that_it_interrupted_and_is_linked_to_the_others() -> None:
    here = scene()
    here.submit(Request("a", (1, 2), 40))
    here.submit(Request("b", (3,), 40))
    here.during = lambda step: setattr(here, "breaks", len(step.rows[0].sequence.generated) == 12)
    async with here.running() as task:
        await asyncio.wait([task])
        error = task.exception()
        assert isinstance(error, MeshError)
    recovery = Recovery(str(error), detect_ns=1000)
    here.recoveries.begin(error.reason, recovery)
    here.engine.interrupt(error, recovery.note_resumed)
    assert here.rounds == []
    here.breaks, here.during = False, lambda _: None
    recovery.assemble_ns, recovery.canary_ns = 2000, 3000
    recovery.note_whole()
    assert here.named("recovery") == []
    await here.finish()
    requests = {attributes(span)["gen_ai.response.id"]: span for span in here.named("text_completion")}
    assert [events(span) for span in requests.values()] == [["first_token", "interrupted", "resumed"]] * 2
    broken = [span for span in here.named("step") if span.status.status_code is StatusCode.ERROR]
    assert [attributes(span)["shardmesh.rounds"] for span in broken] == [2, 2]
    (span,) = here.named("recovery")
    assert {parent_id(span), *(link.context.span_id for link in span.links)} == {span_id(one) for one in requests.values()}
    assert attributes(span) == {"error.type": "WORKER_LOST", "shardmesh.failure": "worker b:1 died"}
    parts = [one for one in here.exporter.get_finished_spans() if one.parent and parent_id(one) == span_id(span)]
    lengths = [(part.name, part.end_time - part.start_time) for part in parts]  # type: ignore[operator]
    assert lengths == [("detect", 1000), ("assemble", 2000), ("canary", 3000), ("replay", recovery.replay_ns)]
    assert recovery.replay_ns > 0
    # Steps of the replay are looked at closely again: one of prefill, and the next ones.
    before = [one for one in here.named("head") if one.end_time < span.start_time]  # type: ignore[operator]
    assert len(before) == 12
    assert len(here.named("head")) == 12 + 2 * STEPS_WITH_ROUNDS


async def test_a_recovery_that_interrupted_nobody_is_sampled_by_itself_and_ends_when_the_mesh_is_whole() -> None:
    here = scene()
    recovery = Recovery("the canary died")
    here.recoveries.begin("WORKER_LOST", recovery)
    here.engine.interrupt(WorkerLost("the canary died"), recovery.note_resumed)
    recovery.note_whole()
    recovery.note_whole()
    (span,) = here.named("recovery")
    assert span.parent is None
    assert [one.name for one in here.exporter.get_finished_spans()] == ["detect", "assemble", "canary", "replay", "recovery"]


async def test_a_mesh_that_is_cut_anew_is_no_failure() -> None:
    here = scene()
    here.submit(Request("r", (1, 2), 5))
    recovery = Recovery("")
    here.recoveries.begin("", recovery)
    here.engine.interrupt(None, recovery.note_resumed)
    recovery.note_whole()
    await here.finish()
    assert here.named("recovery") == []
    (span,) = here.named("reshard")
    assert attributes(span) == {}
    assert span.status.status_code is StatusCode.UNSET


async def test_a_request_that_gave_up_its_pages_says_so() -> None:
    here = scene(limits=Limits(num_pages=6, page_tokens=4, max_rows=8))
    here.submit(Request("old", (1, 2, 3, 4), 12))
    here.submit(Request("young", (5, 6, 7), 12))
    await here.finish()
    assert here.engine.scheduler.num_preemptions == 1
    found = {attributes(span)["gen_ai.response.id"]: events(span) for span in here.named("text_completion")}
    assert found == {"old": ["first_token"], "young": ["first_token", "preempted"]}


def test_a_refused_request_says_why_without_words_of_the_caller() -> None:
    here = scene()
    with pytest.raises(InvalidArgument):
        here.submit(Request("r", (99999,), 1), f"00-{TRACE}-{SPAN}-01")
    (span,) = here.exporter.get_finished_spans()
    assert parent_id(span) == int(SPAN, 16)
    assert attributes(span)["error.type"] == "INVALID_ARGUMENT"
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert "99999" not in span.to_json()


def test_how_a_request_ended_is_told() -> None:
    here = scene()
    left = here.submit(Request("left", (1,), 9))
    here.submit(Request("failed", (1,), 9))
    left.cancel()
    left.cancel()
    here.engine.fail(WorkerLost("nobody is there"))
    gone, failed = here.exporter.get_finished_spans()
    assert attributes(gone)["gen_ai.response.finish_reasons"] == ("abort",)
    assert gone.status.status_code is StatusCode.UNSET
    assert attributes(failed)["error.type"] == "WORKER_LOST"
    assert failed.status.status_code is StatusCode.ERROR


def test_log_lines_carry_the_trace_that_begins_here() -> None:
    here = scene()
    completion = here.submit(Request("r", (1,), 9))
    completion.cancel()
    (span,) = here.exporter.get_finished_spans()
    assert here.logged == f"{span.get_span_context().trace_id:032x}"
    here.submit(Request("r", (1,), 9), f"00-{TRACE}-{SPAN}-01")
    assert here.logged == TRACE
