"""Signals and broken pipes end a command as a shell expects, after it cleaned up."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from coordinator.commands.running import run

async def main():
    try:
        print("ready", flush=True)
        while {chatty}:
            print("x" * 1000, flush=True)
            await asyncio.sleep(0)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if {regular}:
            return
        raise
    finally:
        print("cleaned up", file=sys.stderr, flush=True)

run(main())
"""


def start(*, chatty: bool = False, regular: bool = False) -> subprocess.Popen[str]:
    program = PROGRAM.format(chatty=chatty, regular=regular)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_cancels_and_gives_its_exit_code(number: signal.Signals, code: int) -> None:
    with start() as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "cleaned up\n")


def test_command_that_takes_a_signal_for_its_regular_end_succeeds() -> None:
    with start(regular=True) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "cleaned up\n")


def test_broken_pipe_cleans_up_and_shows_no_traceback() -> None:
    with start(chatty=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=20)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "cleaned up\n")
