"""The live screen of `coordctl top` on a real mesh, in a terminal as a person has it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protos.program import EXIT_FAILURE, EXIT_MISTAKE
from tests.mesh.conftest import Mesh, MeshMaker, start_coordinator

DEADLINE_S = 60
ROWS, COLUMNS = 24, 100
# The terminal controls the program, as after a login: Ctrl-C is its doing.
PROGRAM = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'coordinator', *sys.argv[1:]])"
)
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
HOME = "\x1b[H"


class Terminal:
    """The master's end: what the program wrote, and the keyboard."""

    def __init__(self, master: int, slave: int) -> None:
        self._master, self._slave = master, slave
        self._settings = termios.tcgetattr(slave)
        self._grown = asyncio.Event()
        self.written = ""

    def receive(self) -> None:
        self.written += os.read(self._master, 65536).decode(errors="replace")
        self._grown.set()

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    @property
    def num_screens(self) -> int:
        """How often the screen was drawn, the one that is being drawn not counted."""
        return self.written.count(HOME) - 1

    def screen(self) -> list[str]:
        """Lines of the latest screen that is complete."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.written.split(HOME)[-2])
        return [line.rstrip() for line in text.split("\r\n")]

    async def wait(self, is_there: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not is_there():
                    self._grown.clear()
                    await self._grown.wait()
        except TimeoutError:
            pytest.fail(f"the terminal shows {self.written[-4000:]!r}")

    async def wait_line(self, pattern: str, *, after: int = 0) -> list[str]:
        """Wait until a screen after so many has a line that matches, and give all its lines."""
        wanted = re.compile(pattern)
        await self.wait(lambda: self.num_screens > max(after, 1) and any(map(wanted.match, self.screen())))
        return self.screen()

    def assert_restored(self) -> None:
        assert termios.tcgetattr(self._slave) == self._settings
        assert self.written.count(ENTER) == self.written.count(LEAVE)
        # Nothing is left on the screen that was there before.
        assert self.written.endswith(f"{SHOW}{LEAVE}")
        assert "Traceback" not in self.written


@asynccontextmanager
async def top(*arguments: str, term: str = "xterm-256color") -> AsyncIterator[tuple[asyncio.subprocess.Process, Terminal]]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    terminal = Terminal(master, slave)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, terminal.receive)
    sizes = ("COLUMNS", "LINES")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, "top", "--interval", "0.2", *arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**{name: value for name, value in os.environ.items() if name not in sizes}, "TERM": term},
    )
    try:
        yield process, terminal
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        loop.remove_reader(master)
        os.close(master)
        os.close(slave)


async def ended(process: asyncio.subprocess.Process) -> int:
    return await asyncio.wait_for(process.wait(), DEADLINE_S)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


async def restart(running: Mesh) -> None:
    running.coordinator = await start_coordinator(running.coordinator.settings)


async def test_it_draws_renews_and_leaves_the_terminal_as_it_was(mesh: MeshMaker, checkpoint: Path) -> None:
    async with (
        mesh(checkpoint, 2, spares=1, metrics_listen="127.0.0.1:0") as running,
        top("--coordinator", running.coordinator.address) as (process, terminal),
    ):
        first = await terminal.wait_line("serving on 2 shards, epoch 1, proven")
        assert terminal.written.startswith(ENTER)
        assert HIDE in terminal.written
        assert len(first) == ROWS
        assert max(map(len, first)) <= COLUMNS
        text = "\n".join(first)
        for wanted in ("0 running, 0 waiting, KV 0%, 0.0 tokens/s", "shard 0", "shard 1", "spare", "hot expert"):
            assert wanted in text
        work = asyncio.ensure_future(running.generate([5, 6, 7], 400))
        await terminal.wait_line(r"1 running, 0 waiting, KV \d+%, [1-9][0-9.]* tokens/s", after=terminal.num_screens)
        await work
        await terminal.wait_line("0 running, 0 waiting, KV 0%, 0.0 tokens/s", after=terminal.num_screens)
        terminal.press(b"\x03")
        assert await ended(process) == 0
        await terminal.wait(lambda: terminal.written.endswith(LEAVE))
        terminal.assert_restored()


async def test_a_coordinator_that_goes_away_is_one_line_and_may_come_back(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1) as running:
        address = running.coordinator.address
        async with top("--coordinator", address) as (process, terminal):
            await terminal.wait_line("serving on 1 shard,")
            await running.coordinator.stop(0)
            told = "no answer for [1-9][0-9]* s: coordinator"
            lines = await terminal.wait_line(told)
            # Above what was known last, which stays.
            assert re.match(told, lines[0])
            # Long as it is, it was folded.
            assert "connect: No such file or directory" in " ".join(lines[:5])
            assert any(line.startswith("serving on 1 shard,") for line in lines)
            assert process.returncode is None
            await restart(running)
            lines = await terminal.wait_line("serving on 1 shard,", after=terminal.num_screens)
            while lines[0].startswith("no answer"):
                lines = await terminal.wait_line("serving on 1 shard,", after=terminal.num_screens)
            assert lines[0].startswith("serving on 1 shard,")
            await running.coordinator.stop(0)
            await terminal.wait_line(told, after=terminal.num_screens)
            terminal.press(b"\x03")
            assert await ended(process) == 0
            await terminal.wait(lambda: terminal.written.endswith(LEAVE))
            terminal.assert_restored()


@pytest.mark.parametrize(
    ("term", "code", "text"),
    [
        ("dumb", EXIT_MISTAKE, "needs a terminal that can move its cursor: say --once"),
        ("xterm", EXIT_FAILURE, "coordinator unix:/nobody: "),
    ],
)
async def test_what_cannot_be_shown_is_one_line_and_no_screen(term: str, code: int, text: str) -> None:
    async with top("--coordinator", "unix:/nobody", term=term) as (process, terminal):
        assert await ended(process) == code
        await terminal.wait(lambda: terminal.written.endswith("\n"))
        assert ENTER not in terminal.written
        assert terminal.written.startswith("coordctl: ")
        assert text in terminal.written
        assert terminal.written.count("\n") == 1
