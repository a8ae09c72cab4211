"""The programs under test: started, signalled, and ended whatever happens.

Each is killed by the system when the thread that started it ends (`setpriv --pdeathsig`, where there is such a tool), so that
not even a test run that is killed itself leaves anything behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from tests.faults.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
START_S = 90.0
"""Importing torch takes seconds, on a busy core many."""
END_S = 30.0
_SETPRIV = shutil.which("setpriv")
_TAIL_BYTES = 4000


class Program:
    """A process of ours, `python -m shardworker ...` or `python -m coordinator ...`."""

    def __init__(self, log: Path, arguments: Sequence[str], inside: Sequence[str] = ()) -> None:
        """Start it.

        Args:
            log: file for what it prints, standard error included; appended to.
            arguments: after `python -m`.
            inside: a command that runs another, as `nsenter` does.

        """
        self.log = log
        self.name = " ".join(arguments[:2])
        dying = [_SETPRIV, "--pdeathsig", "KILL", "--"] if _SETPRIV else []
        self._skip = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*inside, *dying, sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Ctrl-C is for the tests, which end their programs themselves.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, be it stopped."""
        return self._process.poll() is None

    @property
    def rss_bytes(self) -> int:
        """Resident set now."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def printed(self) -> str:
        """What it printed since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._skip)
            return file.read().decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it by SIGKILL, also if it is stopped; returns when it is gone."""
        self._process.kill()
        self._process.wait(END_S)

    async def wait_printed(self, text: str, deadline_s: float = START_S) -> None:
        """Wait until it printed something."""

        def has() -> bool:
            printed = self.printed()
            assert self.alive or text in printed, f"{self.name} ended with {self._process.returncode}:\n{self.tail()}"
            return text in printed

        await wait_until(f"{self.name} to print {text!r} ({self.log})", has, deadline_s)

    async def wait_ended(self, deadline_s: float) -> int:
        """Wait for its end and give its exit code."""
        await wait_until(f"{self.name} to end ({self.log})", lambda: not self.alive, deadline_s)
        return int(self._process.returncode)

    def tail(self) -> str:
        """Give the end of what it printed, for people."""
        return self.printed()[-_TAIL_BYTES:]


class Programs:
    """All programs of a test."""

    def __init__(self, directory: Path) -> None:
        """Start none; their logs go to `directory`."""
        self.directory = directory
        self._started: list[Program] = []

    def start(self, name: str, *arguments: str, inside: Sequence[str] = ()) -> Program:
        """Start one; `name` names its log."""
        program = Program(self.directory / f"{name}.log", arguments, inside)
        self._started.append(program)
        return program

    def __enter__(self) -> Self:
        """Use as a context that ends all of them."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill whatever still runs, and wait for it."""
        for program in self._started:
            if program.alive:
                program.send(signal.SIGKILL)
        for program in self._started:
            program.kill()
