"""The owner of the device, and the only place where async meets torch.

Jobs run one at a time, in the order in which they were given: in a thread, so that the worker answers meanwhile, or, where a job
is short and nothing else is at hand, at once on the event loop, which saves two thread switches, 96 times a token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Timed(NamedTuple, Generic[T]):
    """A job's result and its times, nanoseconds."""

    result: T
    queue_ns: int
    """From being given to its start."""
    compute_ns: int
    """From its start to its end."""


class Executor:
    """A device, and a thread for it."""

    def __init__(self, device: torch.device, num_threads: int | None) -> None:
        """Start the thread.

        Args:
            device: that the jobs use.
            num_threads: of the arithmetic on the CPU; by default torch's own choice.

        """
        self.device = device
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.num_threads = torch.get_num_threads()
        # Jobs of the thread; each number has one writer.
        self._num_given = 0
        self._num_done = 0
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: a job that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> asyncio.Future[Timed[T]]:
        """Run a job after those given before; call from the event loop. A cancelled future's job runs all the same."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Timed[T]] = loop.create_future()
        given = time.perf_counter_ns()

        def run() -> None:
            start = time.perf_counter_ns()
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001  # handed to the waiter
                _hand_over(loop, _fail, future, error)
            else:
                _hand_over(loop, _finish, future, Timed(result, start - given, time.perf_counter_ns() - start))

        self._num_given += 1
        self._jobs.put(run)
        return future

    async def run_short(self, job: Callable[[], T]) -> Timed[T]:
        """Run a job that may hold up the event loop, here if the device is idle, or else after the jobs given before."""
        if self.device.type != "cpu" or self._num_given != self._num_done:
            return await self.submit(job)
        given = time.perf_counter_ns()
        with torch.inference_mode():
            start = time.perf_counter_ns()
            result = job()
        return Timed(result, start - given, time.perf_counter_ns() - start)

    def close(self, timeout_s: float) -> bool:
        """End the thread after the jobs given so far; whether it ended in time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job()
                self._num_done += 1
                # Nothing of a job may live on until the next one comes.
                del job


def _hand_over(loop: asyncio.AbstractEventLoop, act: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(act, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
