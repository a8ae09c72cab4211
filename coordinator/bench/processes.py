"""Child processes of a benchmark: talked to by lines, gone when it ends, however it ends.

They are started by `subprocess`, which on Linux does not fork: a fork of a process in which gRPC runs wakes gRPC up in the child,
between fork and exec, where it crashes now and then. (Uvloop's own subprocesses do fork.)
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Self

from protos.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Child:
    """A Python process of ours. It ends when its standard input does, so none outlives its parent for long."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        """Start `python -m` with a module and its arguments; `name` is for errors."""
        self._name = name
        self._process = subprocess.Popen(  # noqa: S603  # ourselves
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A Ctrl-C in the terminal is for this process; it ends the others itself.
            start_new_session=True,
        )

    def say(self, line: str) -> None:
        """Write a line to its standard input; if nobody listens any more, `hear` will say so."""
        with contextlib.suppress(BrokenPipeError):
            stream = _there(self._process.stdin)
            stream.write(f"{line}\n".encode())
            stream.flush()

    async def hear(self, deadline_s: float) -> str:
        """Wait for the next line of its standard output.

        Raises:
            MeshError: it ended, or is silent for too long.

        """
        try:
            async with asyncio.timeout(deadline_s):
                # The thread ends with the process.
                if line := await asyncio.to_thread(_there(self._process.stdout).readline):
                    return line.decode().strip()
        except TimeoutError:
            raise MeshError(f"{self._name} said nothing for {deadline_s:g} s") from None
        said = await asyncio.to_thread(_there(self._process.stderr).read)
        code = await asyncio.to_thread(self._process.wait)
        last_line = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise MeshError(f"{self._name} ended with exit code {code}: {last_line}")

    def __enter__(self) -> Self:
        """Use as a context that ends the process."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill it: it holds nothing that would have to be put in order."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # of a line that nobody took
            _there(self._process.stdin).close()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            _there(stream).close()


@contextlib.contextmanager
def children(name: str, commands: Sequence[Sequence[str]]) -> Iterator[list[Child]]:
    """Run `python -m ...` once for each of the commands, and end all of them at the end.

    Args:
        name: of each, for errors.
        commands: a module and its arguments.

    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Child(name, arguments)) for arguments in commands]


def _there(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("a child without pipes")
    return stream
