"""The caller's trace id gets into log lines, and nothing else that a caller may send does."""

import contextvars
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from coordinator.trace_context import CallerTrace, bind_trace, caller_trace

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def bound(*metadata: tuple[str, Any]) -> tuple[dict[str, Any], CallerTrace | None]:
    def bind() -> tuple[dict[str, Any], CallerTrace | None]:
        structlog.contextvars.clear_contextvars()
        context: Any = SimpleNamespace(invocation_metadata=lambda: metadata or None)
        bind_trace(context)
        return structlog.contextvars.get_contextvars(), caller_trace()

    return contextvars.copy_context().run(bind)


@pytest.mark.parametrize(
    ("value", "flags"),
    [(f"00-{TRACE}-{SPAN}-01", 1), (f"00-{TRACE}-{SPAN}-00", 0), (f"cc-{TRACE}-{SPAN}-83-what.comes", 0x83)],
)
def test_the_trace_is_kept_and_its_id_is_bound(value: str, flags: int) -> None:
    assert bound(("user-agent", "x"), ("traceparent", value)) == ({"trace_id": TRACE}, CallerTrace(TRACE, SPAN, flags))


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("traceparent", ""),),
        (("traceparent", f"ff-{TRACE}-{SPAN}-01"),),
        (("traceparent", f"00-{'0' * 32}-{SPAN}-01"),),
        (("traceparent", f"00-{TRACE}-{'0' * 16}-01"),),
        (("traceparent", f"00-{TRACE.upper()}-{SPAN}-01"),),
        (("traceparent", f"00-{TRACE}-{SPAN}-01\n"),),
        (("traceparent", b"00"),),
        (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("traceparent", f"00-{TRACE}-{SPAN}-01")),
    ],
)
def test_anything_else_is_passed_over(metadata: tuple[tuple[str, Any], ...]) -> None:
    assert bound(*metadata) == ({}, None)
