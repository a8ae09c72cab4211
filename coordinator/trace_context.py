"""The caller's trace, as W3C Trace Context says it in gRPC metadata: log lines carry its id."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    import grpc

# Version, trace id, parent id, flags; what a later version adds is passed over.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def bind_trace(context: grpc.aio.ServicerContext) -> None:
    """Put the trace id of a call into its log lines, if the caller sent one; whatever else it sent is no error."""
    values = [value for name, value in context.invocation_metadata() or () if name == "traceparent"]
    if len(values) == 1 and isinstance(values[0], str) and (match := _TRACEPARENT.fullmatch(values[0])):
        structlog.contextvars.bind_contextvars(trace_id=match["trace"])
