"""What programs write to their logs: constant events, and facts of which none is a prompt, a token, a key or a certificate."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "coordinator", "shardworker")
METHODS = ("debug", "info", "warning", "error", "exception", "critical")

FACTS = {
    # Places, sizes, counts and times.
    *("worker", "workers", "shard", "epoch", "step", "device", "threads", "kv_pages", "weights_bytes", "file_bytes", "files"),
    *("came", "gone", "name", "holder", "lease", "port", "service", "term"),
    *("assignment", "shards", "present", "plans", "capability", "wanted", "tls", "prompt_tokens", "completion_tokens"),
    *("detect_ms", "assemble_ms", "canary_ms", "replay_ms", "stall_ms"),
    # What callers are known by, and what they call their requests.
    *("caller", "request_id", "outcome"),
    # Errors: their texts are of this program, not of a request; of unknown ones the type and where they were raised.
    *("error", "reason", "frames"),
}
"""A new one is added after asking whether it may ever hold what a caller sent."""


def calls() -> Iterator[tuple[str, ast.Call]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def function(call: ast.Call) -> str:
    """Name of what is called: `log.info`, `print`."""
    if not isinstance(call.func, ast.Attribute):
        return call.func.id if isinstance(call.func, ast.Name) else "?"
    owner = call.func.value
    return f"{owner.id if isinstance(owner, ast.Name) else '?'}.{call.func.attr}"


CALLS = {place: call for place, call in calls() if function(call) in {f"log.{method}" for method in METHODS}}


def test_the_search_finds_log_lines() -> None:
    assert len(CALLS) > 15


@pytest.mark.parametrize("place", CALLS)
def test_a_log_line_is_a_constant_event_with_known_facts(place: str) -> None:
    call = CALLS[place]
    (event,) = call.args
    assert isinstance(event, ast.Constant)
    assert isinstance(event.value, str)
    new = {keyword.arg for keyword in call.keywords} - FACTS
    assert not new, f"may {new} ever hold what a caller sent? If not, it belongs into FACTS"


def test_nothing_else_writes_lines_of_its_own() -> None:
    writers = {"print", "logging.debug", "logging.info", "logging.warning", "logging.error", "logging.getLogger", "warnings.warn"}
    # Lines of a library are made ours there.
    makers = [place for place, call in calls() if function(call) in writers and not place.startswith("coordinator/tracing.py:")]
    assert makers == []
