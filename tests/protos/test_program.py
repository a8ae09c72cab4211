"""How programs end, as real processes."""

import signal
import subprocess
import sys

import pytest

BEFORE_ANY_EVENT_LOOP = """
import sys, click
from protos.program import run_program

@click.command()
def command():
    print("imports take long", flush=True)
    sys.stdin.read()

run_program("program", command)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_an_event_loop_ends_the_program_by_an_exit(number: int, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", BEFORE_ANY_EVENT_LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"imports take long\n"
        process.send_signal(number)
        # An exit of its own and not by the system's default, which the first process of a container does not have.
        assert process.wait(20) == code
