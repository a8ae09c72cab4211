"""The way of spans out of the process: what the environment says, and collectors that fail."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from coordinator import tracing
from coordinator.rounds import RoundObservers
from coordinator.tracing import Tracing
from protos.errors import InvalidArgument, NotServing

URL = "http://127.0.0.1:1"


class Exporter(SpanExporter):
    """Keeps spans, fails, raises, or waits until it is shut down."""

    def __init__(self, *results: SpanExportResult | Exception) -> None:
        self.results = list(results)
        self.spans: list[ReadableSpan] = []
        self.waits = False
        self.waiting, self.shut = threading.Event(), threading.Event()
        self.calls: Counter[str] = Counter()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.calls["export"] += 1
        self.spans += spans
        if self.waits:
            self.waiting.set()
            assert self.shut.wait(10)
            return SpanExportResult.FAILURE
        result = self.results.pop(0) if self.results else SpanExportResult.SUCCESS
        if isinstance(result, Exception):
            raise result
        return result

    def shutdown(self) -> None:
        self.calls["shutdown"] += 1
        self.shut.set()


@pytest.fixture(autouse=True)
def _all_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")


def tracing_to(exporter: Exporter) -> Tracing:
    return Tracing(exporter, "tiny", RoundObservers())


def refuse(made: Tracing, count: int = 1) -> None:
    """Make spans without a mesh."""
    for _ in range(count):
        made.spans.request_refused(NotServing("no mesh"))


async def exported(made: Tracing, exporter: Exporter) -> list[ReadableSpan]:
    refuse(made)
    await made.stop()
    return exporter.spans


async def test_what_is_there_is_sent_at_the_end_and_once() -> None:
    exporter = Exporter()
    made = tracing_to(exporter)
    refuse(made, 3)
    await made.stop()
    await made.stop()
    assert [span.name for span in exporter.spans] == ["text_completion tiny"] * 3
    assert exporter.calls["shutdown"] == 1


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "shardmesh"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,team=a"}, "ours"),
    ],
)
async def test_the_service_has_the_name_that_the_environment_gives(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)
    exporter = Exporter()
    (span,) = await exported(tracing_to(exporter), exporter)
    assert span.resource.attributes["service.name"] == name
    assert span.resource.attributes.get("team") == ("a" if name == "ours" else None)


async def test_without_a_sampler_in_the_environment_one_of_a_hundred_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_TRACES_SAMPLER")
    exporter = Exporter()
    made = tracing_to(exporter)
    refuse(made, 20000)
    await made.stop()
    # Five deviations of 14 either way.
    assert 130 < len(exporter.spans) < 270


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf': traces go by grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "TRACES_PROTOCOL is 'http/json'"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "as the environment's OTEL_ variables say: .*soon"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "rar"}, "as the environment's OTEL_ variables say: .*rar"),
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER is 'sometimes', none of always_on, "),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "1"}, "as the environment's OTEL_ variables say: max_export_batch_size"),
    ],
)
def test_an_environment_that_cannot_work_is_one_clear_error(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgument, match=text):
        Tracing.open(URL, "tiny", RoundObservers())


async def test_what_opentelemetry_warns_of_is_a_log_line_of_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "often")
    with capture_logs() as logs:
        await tracing_to(Exporter()).stop()
    told = [(line["event"], line["error"]) for line in logs]
    assert told == [("OpenTelemetry warns", "Could not convert TRACES_SAMPLER_ARG to float. Using default rate 1.0.")]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("failure", [SpanExportResult.FAILURE, TypeError("not iterable")])
async def test_failures_in_a_row_are_one_line_and_so_is_their_end(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    exporter = Exporter(SpanExportResult.SUCCESS, failure, failure, failure)
    with capture_logs() as logs:
        made = tracing_to(exporter)
        refuse(made, 6)
        await made.stop()
    assert exporter.calls["export"] == 6
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("warning", "traces are not delivered"),
        ("info", "traces are delivered again"),
    ]
    if isinstance(failure, Exception):
        assert logs[0]["error"] == "not iterable"


async def test_a_collector_that_holds_on_to_the_last_spans_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.05)
    exporter = Exporter()
    exporter.waits = True
    made = tracing_to(exporter)
    refuse(made)
    with capture_logs() as logs:
        stopping = asyncio.create_task(made.stop())
        assert await asyncio.to_thread(exporter.waiting.wait, 10)
        # The loop is free meanwhile.
        assert not stopping.done()
        await asyncio.wait_for(stopping, 10)
    assert exporter.calls == {"export": 1, "shutdown": 1}
    assert [line["event"] for line in logs] == ["traces are not delivered"]
