"""Traces of a real mesh, as a real receiver of OTLP gets them."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from structlog.testing import capture_logs

from coordinator import tracing
from coordinator.app import Coordinator
from coordinator.spans import STEPS_WITH_ROUNDS
from protos.errors import InvalidArgument
from protos.generation_pb2 import GenerateRequest, TokenIds
from protos.generation_pb2_grpc import GenerationStub
from tests.mesh.conftest import Mesh, MeshMaker
from tests.observability.collector import collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


async def generate(
    running: Mesh,
    max_tokens: int,
    metadata: tuple[tuple[str, str], ...] = SAMPLED,
    at_token: Mapping[int, Callable[[], Awaitable[None]]] | None = None,
) -> list[int]:
    """Generate as a caller does that sends its trace; `at_token` says what is done when so many tokens are there."""
    request = GenerateRequest(token_ids=TokenIds(ids=[1, 2, 3]), max_tokens=max_tokens, ignore_eos=True)
    tokens: list[int] = []
    async with grpc.aio.insecure_channel(running.coordinator.address) as channel:
        async for response in GenerationStub(channel).Generate(request, metadata=metadata):
            tokens += response.delta.token_ids
            if at_token and len(tokens) in at_token and response.delta.token_ids:
                await at_token[len(tokens)]()
    return tokens


def said(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


async def test_a_callers_trace_goes_on_through_request_step_and_round(mesh: MeshMaker, checkpoint: Path) -> None:
    async with collector() as found:
        async with mesh(checkpoint, 2, trace_to=found.url) as running:
            await generate(running, 12, ())
            await generate(running, 12, (("traceparent", f"00-{'ab' * 16}-{SPAN}-00"),))
            assert len(await generate(running, 12)) == 12
            workers = [worker.address for worker in running.workers]
        # What was left when the coordinator stopped is here: nobody waited for a batch to fill.
        spans = found.spans
        assert {resource["service.name"] for resource in found.resources} == {"shardmesh"}
    own = [span for span in spans if span.trace_id == bytes.fromhex(TRACE)]
    # The caller that sent none is sampled by chance, the one that keeps nothing never.
    assert all(span.trace_id != bytes.fromhex("ab" * 16) for span in spans)
    (request,) = [span for span in own if span.name == f"text_completion {checkpoint}"]
    assert request.parent_span_id == bytes.fromhex(SPAN)
    assert request.kind == Span.SPAN_KIND_SERVER
    assert said(request)["gen_ai.usage.output_tokens"] == 12
    assert [event.name for event in request.events] == ["shardmesh.first_token"]
    steps = [span for span in own if span.name == "step"]
    assert len(steps) == 12
    assert {step.parent_span_id for step in steps} == {request.span_id}
    rounds = [span for span in own if span not in (request, *steps)]
    # Three layers, attention and experts each, and the head.
    assert [one.name for one in rounds[:7]] == ["attend", "feed_forward"] * 3 + ["head"]
    assert [said(one).get("shardmesh.layer") for one in rounds[:7]] == [0, 0, 1, 1, 2, 2, None]
    assert len(rounds) == 7 * STEPS_WITH_ROUNDS
    by_id = {step.span_id: step for step in steps}
    for one in rounds:
        step = by_id[one.parent_span_id]
        assert step.start_time_unix_nano <= one.start_time_unix_nano < one.end_time_unix_nano <= step.end_time_unix_nano
        assert said(one)["shardmesh.slowest.worker"] == workers[int(str(said(one)["shardmesh.slowest.shard"]))]
    assert len({span.span_id for span in own}) == len(own) == 1 + 12 + 7 * STEPS_WITH_ROUNDS


async def test_beside_metrics_both_hear_of_all(mesh: MeshMaker, checkpoint: Path) -> None:
    async with collector() as found:
        async with mesh(checkpoint, 1, trace_to=found.url, metrics_listen="127.0.0.1:0") as running:
            await generate(running, 3)
            described = await running.client.mesh()
        assert len(found.named("step")) == 3
    assert described.hottest_experts
    assert described.workers[0].rounds.compute_ns > 0


async def test_a_lost_worker_is_a_recovery_in_the_trace_of_whom_it_held_up(mesh: MeshMaker, checkpoint: Path) -> None:
    async with collector() as found:
        async with mesh(checkpoint, 2, spares=1, trace_to=found.url) as running:
            lost = running.workers[0]
            assert len(await generate(running, 200, at_token={10: lambda: lost.stop(0)})) == 200
        (request,) = found.named("text_completion")
        (recovery,) = found.named("recovery")
        parts = [span for span in found.spans if span.parent_span_id == recovery.span_id]
    assert [event.name for event in request.events] == [
        "shardmesh.first_token",
        "shardmesh.interrupted",
        "shardmesh.resumed",
    ]
    assert (recovery.trace_id, recovery.parent_span_id) == (request.trace_id, request.span_id)
    assert said(recovery)["error.type"] == "WORKER_LOST"
    assert [part.name for part in parts] == ["detect", "assemble", "canary", "replay"]
    assert [part.start_time_unix_nano for part in parts] == sorted(part.start_time_unix_nano for part in parts)
    assert recovery.start_time_unix_nano == parts[0].start_time_unix_nano
    assert recovery.end_time_unix_nano == parts[-1].end_time_unix_nano
    assert request.start_time_unix_nano < recovery.start_time_unix_nano < recovery.end_time_unix_nano < request.end_time_unix_nano
    broken = [span for span in found.named("step") if span.status.code == Status.STATUS_CODE_ERROR]
    assert len(broken) == 1


async def test_a_collector_that_is_not_there_is_one_log_line_and_disturbs_nobody(
    mesh: MeshMaker, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        with capture_logs() as logs:
            async with mesh(checkpoint, 2, trace_to=f"http://127.0.0.1:{taken.getsockname()[1]}") as running:
                plain = (await running.generate([1, 2, 3], 60)).tokens
                while not any(line["event"] == "traces are not delivered" for line in logs):
                    assert await generate(running, 60) == plain
                for _ in range(3):
                    assert await generate(running, 60) == plain
    told = [line for line in logs if "trace" in line["event"] or "OpenTelemetry" in line["event"]]
    assert [line["event"] for line in told] == ["traces are not delivered"]
    assert "127.0.0.1" in told[0]["error"]


async def test_a_collector_that_never_answers_holds_up_neither_streams_nor_the_end(
    mesh: MeshMaker, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    async with collector() as found:
        found.open.clear()
        async with mesh(checkpoint, 2, trace_to=found.url) as running:
            plain = (await running.generate([1, 2, 3], 40)).tokens
            assert await generate(running, 40) == plain
            await asyncio.wait_for(found.asked.wait(), 10)
            assert await generate(running, 40) == plain
            started = time.monotonic()
            await running.coordinator.stop(0)
            assert time.monotonic() - started < 5


async def test_without_the_library_who_asks_for_traces_is_told_what_to_install(
    mesh: MeshMaker, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "coordinator.tracing")
    with pytest.raises(InvalidArgument, match=r"--trace-to needs OpenTelemetry: pip install 'shardmesh\[tracing\]'"):
        async with mesh(checkpoint, 1, trace_to="http://127.0.0.1:4317"):
            pass
    async with mesh(checkpoint, 1) as running:
        assert isinstance(running.coordinator, Coordinator)
        assert len(await generate(running, 2)) == 2
