"""The owner of the device, and the only place where async meets torch.

Jobs run one at a time, in the order in which they were given: in a thread, so that the worker answers meanwhile, or, where a job
is short and nothing else is at hand, at once on the event loop, which saves two thread switches, 96 times a token. What takes
long and needs the device only now and then, a load, has a thread of its own beside, and gives the device its jobs one by one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

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


class OnDevice(Protocol):
    """Runs a job on the device, from another thread, which waits for its result."""

    def __call__(self, job: Callable[[], T], /) -> T:
        """Run it after the jobs given before."""


class Executor:
    """A device, a thread for it, and another one for what goes on beside it."""

    def __init__(self, device: torch.device, num_threads: int | None) -> None:
        """Start the threads.

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
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Daemons: a job that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()
        threading.Thread(target=self._run_beside, name="beside", daemon=True).start()

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

    def beside(self, work: Callable[[OnDevice], T]) -> asyncio.Future[T]:
        """Do long work beside the device's jobs, after such work given before; call from the event loop.

        A cancelled future's work is done all the same.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = work(_ByLoop(self, loop))
            except BaseException as error:  # noqa: BLE001  # handed to the waiter
                _hand_over(loop, _fail, future, error)
            else:
                _hand_over(loop, _finish, future, result)

        self._work.put(run)
        return future

    def close(self, timeout_s: float) -> bool:
        """End the device's thread after the jobs given so far; whether it ended in time."""
        self._work.put(None)
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

    def _run_beside(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with torch.inference_mode():
            while (work := self._work.get()) is not None:
                work()
                del work


class _ByLoop:
    """An `OnDevice` that asks the event loop, which must not run a short job itself at the same time."""

    def __init__(self, executor: Executor, loop: asyncio.AbstractEventLoop) -> None:
        self._executor = executor
        self._loop = loop

    def __call__(self, job: Callable[[], T]) -> T:
        return asyncio.run_coroutine_threadsafe(self._run(job), self._loop).result()

    async def _run(self, job: Callable[[], T]) -> T:
        return (await self._executor.submit(job)).result


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
