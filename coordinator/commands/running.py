"""How a command's coroutine is run: signals cancel it, and the exit code says which."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine

from protos.program import exit_after

try:
    from uvloop import new_event_loop
except ImportError:  # not on every platform
    from asyncio import new_event_loop  # type: ignore[assignment]


def run(main: Coroutine[None, None, None]) -> None:
    """Run to the end. The first SIGINT or SIGTERM cancels it, so that it can clean up; the second one ends the process.

    The exit code after a signal is 128 + its number, unless the coroutine takes the cancellation for its regular end.
    """
    received: list[signal.Signals] = []

    async def cancellable() -> None:
        task = asyncio.ensure_future(main)

        def on_signal(number: signal.Signals) -> None:
            if received:
                os._exit(exit_after(number))
            received.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        await task

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(cancellable())
        except asyncio.CancelledError:
            if not received:
                raise
            sys.exit(exit_after(received[0]))
        except BrokenPipeError:
            # Whoever read has enough; what is buffered still would fail again when the interpreter flushes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(exit_after(signal.SIGPIPE))
