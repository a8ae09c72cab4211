"""Logging, as another process sees it: standard error only, JSON unless it is a terminal, never local variables."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FAILING = """
import structlog
from protos.log import configure_logging
configure_logging()
def answer(prompt):
    raise ValueError("no answer")
try:
    answer("my " + "secret")
except ValueError as error:
    structlog.get_logger().error("request failed", exc_info=error)
"""


def run(program: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, stderr=stderr)


def lines(program: str) -> list[dict[str, object]]:
    result = run(program)
    assert result.stdout == ""
    return [json.loads(line) for line in result.stderr.splitlines()]


def test_a_line_is_one_json_object_with_event_level_time_and_facts() -> None:
    (line,) = lines("""
import structlog
from protos.log import configure_logging
configure_logging()
structlog.contextvars.bind_contextvars(request_id="r1")
structlog.get_logger().info("step done", rows=3, text="two\\nlines")
""")
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "step done", "level": "info", "rows": 3, "text": "two\nlines", "request_id": "r1"}


def test_lines_below_the_level_are_left_out() -> None:
    program = """
import structlog
from protos.log import configure_logging
configure_logging("warning")
structlog.get_logger().info("quiet")
structlog.get_logger().warning("loud")
"""
    assert [line["event"] for line in lines(program)] == ["loud"]


def test_an_exception_is_in_the_log_without_local_variables() -> None:
    (line,) = lines(FAILING)
    assert "ValueError: no answer" in line["exception"]
    assert "my secret" not in json.dumps(line)


def test_a_terminal_gets_lines_for_people_without_local_variables() -> None:
    ours, theirs = pty.openpty()
    try:
        run(FAILING, theirs)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "request failed" in shown
    assert "ValueError: no answer" in shown
    assert not shown.startswith("{")
    assert "my secret" not in shown


def test_the_format_can_be_chosen_whatever_standard_error_is() -> None:
    shown = run(FAILING.replace("configure_logging()", 'configure_logging("info", "console")')).stderr
    assert "request failed" in shown
    assert "ValueError: no answer" in shown
    assert not shown.startswith("{")
    # No colours where nobody sees them.
    assert "\x1b" not in shown
    ours, theirs = pty.openpty()
    try:
        run(FAILING.replace("configure_logging()", 'configure_logging("info", "json")'), theirs)
        assert json.loads(os.read(ours, 65536).decode())["event"] == "request failed"
    finally:
        os.close(ours)
        os.close(theirs)
