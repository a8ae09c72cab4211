"""The caller's trace, as W3C Trace Context says it in gRPC metadata: log lines carry its id, spans go below it."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import structlog

if TYPE_CHECKING:
    import grpc

# Version, trace id, parent id, flags; what a later version adds is passed over.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(-.*)?"
)


class CallerTrace(NamedTuple):
    """Where a call stands in its caller's trace."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """Of the caller's span, 16 hexadecimal digits."""
    flags: int
    """Bit 0: the caller keeps this trace."""


_caller: ContextVar[CallerTrace | None] = ContextVar("caller_trace", default=None)


def caller_trace() -> CallerTrace | None:
    """Give the trace of the call that is being served; None if the caller sent none."""
    return _caller.get()


def bind_trace(context: grpc.aio.ServicerContext) -> None:
    """Keep the trace of a call for its log lines and spans, if the caller sent one; whatever else it sent is no error."""
    values = [value for name, value in context.invocation_metadata() or () if name == "traceparent"]
    if len(values) == 1 and isinstance(values[0], str) and (match := _TRACEPARENT.fullmatch(values[0])):
        _caller.set(CallerTrace(match["trace"], match["span"], int(match["flags"], 16)))
        log_trace(match["trace"])


def log_trace(trace_id: str) -> None:
    """Put a trace id, 32 hexadecimal digits, into the log lines of the call that is being served."""
    structlog.contextvars.bind_contextvars(trace_id=trace_id)
