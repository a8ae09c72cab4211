"""Where spans go: OpenTelemetry's SDK, set up by its own environment variables, and a collector that may be missing.

Spans are sent in batches by a thread of their own, by OTLP over gRPC. What cannot be delivered is dropped: the first failure is
one log line, and so is the first success after it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Self

import structlog

from protos.errors import InvalidArgument

try:
    from opentelemetry.exporter.otlp.proto.grpc.exporter import InvalidCompressionValueException
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
except ImportError as missing:
    raise InvalidArgument(f"--trace-to needs OpenTelemetry: pip install 'shardmesh[tracing]' ({missing})") from None

from coordinator.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from coordinator.rounds import RoundObservers

log = structlog.get_logger(__name__)

SERVICE = "shardmesh"
"""Name of the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another."""

RATIO = 0.01
"""Share of the requests without a caller's trace that is sampled, unless OTEL_TRACES_SAMPLER says otherwise."""

FLUSH_S = 3.0
"""Longest that spans may take to leave when the coordinator stops, seconds."""

_SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Tracing:
    """The spans of one coordinator, and their way out."""

    def __init__(self, exporter: SpanExporter, model: str, rounds: RoundObservers) -> None:
        """Begin to make spans.

        Args:
            exporter: where they go.
            model: that is served, as given to `--model`.
            rounds: who hears of rounds.

        Raises:
            ValueError: the environment's OTEL_ variables say what OpenTelemetry does not understand.

        """
        self._delivery = _Delivery(exporter)
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
        named = os.environ.get("OTEL_TRACES_SAMPLER")
        if named and named.lower() not in _SAMPLERS:
            # The library would only warn, and sample all.
            raise ValueError(f"OTEL_TRACES_SAMPLER is {named!r}, none of {', '.join(_SAMPLERS)}")
        sampler = None if named else ParentBasedTraceIdRatio(RATIO)
        # `stop` ends it, with a deadline that the SDK does not have.
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._delivery))
        self.spans = Spans(self._provider.get_tracer("shardmesh"), model, rounds)

    @classmethod
    def open(cls, collector: str, model: str, rounds: RoundObservers) -> Self:
        """Send spans to a collector, which need not be there yet.

        Args:
            collector: http://HOST:PORT, or https://HOST:PORT for TLS.
            model: that is served, as given to `--model`.
            rounds: who hears of rounds.

        Raises:
            InvalidArgument: the environment's OTEL_ variables ask for another protocol, or cannot be understood.

        """
        for name in _PROTOCOLS:
            if os.environ.get(name, "grpc") != "grpc":
                raise InvalidArgument(f"{name} is {os.environ[name]!r}: traces go by grpc alone, to a collector's port for that")
        try:
            return cls(OTLPSpanExporter(collector, insecure=collector.startswith("http://")), model, rounds)
        except (ValueError, RuntimeError, InvalidCompressionValueException) as error:
            raise InvalidArgument(f"traces cannot be sent as the environment's OTEL_ variables say: {error}") from None

    async def stop(self) -> None:
        """Send what is there within `FLUSH_S`, drop the rest. Idempotent."""
        sending = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait([sending], timeout=FLUSH_S)
        # Ends whatever the sending thread still waits for.
        self._delivery.shutdown()
        await sending


class _Delivery(SpanExporter):
    """An exporter whose failures are one log line, however long they last."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._is_failing = False
        self._is_shut = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; called by the sending thread."""
        _sdk_log.failure = ""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001  # whatever a collector answers, spans are not worth more
            _sdk_log.failure = str(error)
            result = SpanExportResult.FAILURE
        was_failing, self._is_failing = self._is_failing, result is not SpanExportResult.SUCCESS
        if self._is_failing and not was_failing:
            log.warning("traces are not delivered", error=_sdk_log.failure)
        if was_failing and not self._is_failing:
            log.info("traces are delivered again")
        return result

    def shutdown(self) -> None:
        """End what is under way. Idempotent."""
        was_shut, self._is_shut = self._is_shut, True
        if not was_shut:
            self._exporter.shutdown()


class _SdkLog(logging.Handler):
    """Takes what OpenTelemetry would print: of failed deliveries, a line for each attempt, `_Delivery` tells itself."""

    failure = ""
    """Why the latest delivery failed at first."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep why a delivery failed, pass on all else."""
        if record.name.startswith("opentelemetry.exporter"):
            self.failure = self.failure or record.getMessage()
        else:
            log.warning("OpenTelemetry warns", error=record.getMessage())


_sdk_log = _SdkLog(logging.WARNING)
_sdk_logger = logging.getLogger("opentelemetry")
_sdk_logger.addHandler(_sdk_log)
_sdk_logger.propagate = False
