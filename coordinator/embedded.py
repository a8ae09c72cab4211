"""A private mesh for the lifetime of one command: worker processes on unix sockets in a private folder.

The processes are the same `shardworker` as in a cluster. Each holds the end of a pipe whose other end is here: should this
process be killed, they see it close, end and remove the folder.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Self

from protos.errors import InvalidArgument, WorkerLost
from protos.program import EXIT_MISTAKE

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 5.0
MAX_SHARDS = 64


class EmbeddedWorkers:
    """Worker processes of this command."""

    def __init__(self, num_workers: int, device: str, threads: int | None) -> None:
        """Describe them; entering the context starts them.

        Args:
            num_workers: how many, in [1, 64].
            device: "auto", "cpu" or "cuda".
            threads: of each worker; None shares the cores evenly.

        Raises:
            InvalidArgument: a number out of range.

        """
        if not 1 <= num_workers <= MAX_SHARDS:
            raise InvalidArgument(f"--shards must be in [1, {MAX_SHARDS}] for an embedded mesh, found {num_workers}")
        if threads is not None and threads < 1:
            raise InvalidArgument(f"--threads must be >= 1, found {threads}")
        self._num_workers = num_workers
        self._device = device
        self._threads = threads or max(1, (os.cpu_count() or 1) // num_workers)
        self._directory = Path()
        self._processes: list[asyncio.subprocess.Process] = []
        self._copying: list[asyncio.Task[None]] = []

    @property
    def folder(self) -> Path:
        """Private to this command; goes with the workers."""
        return self._directory

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the workers."""
        return tuple(f"unix:{self._directory}/worker-{number}.sock" for number in range(self._num_workers))

    @property
    def coordinator_address(self) -> str:
        """Where this command's own coordinator listens."""
        return f"unix:{self._directory}/coordinator.sock"

    async def __aenter__(self) -> Self:
        """Start all workers."""
        self._directory = Path(tempfile.mkdtemp(prefix="shardmesh-"))
        try:
            for address in self.addresses:
                self._processes.append(await self._spawn(address))
        except BaseException:
            await self._stop()
            raise
        return self

    async def wait_listening(self) -> None:
        """Wait until all workers listen.

        Raises:
            InvalidArgument: a worker says that it was asked for something impossible.
            WorkerLost: one ended, or took too long.

        """
        await asyncio.gather(*(self._wait_listening(process) for process in self._processes))

    async def __aexit__(self, *_: object) -> None:
        """End all workers and remove the folder."""
        await self._stop()

    async def _spawn(self, address: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shardworker", "serve", "--listen", address, "--device", self._device),
            *("--threads", str(self._threads), "--log-level", "error", "--embedded-in", str(self._directory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for this process; it ends the workers itself.
            start_new_session=True,
        )

    async def _wait_listening(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None or process.stderr is None:
            raise ValueError("a worker without standard output")
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                line = await process.stdout.readline()
                if not line.startswith(b"listening on "):
                    said = (await process.stderr.read()).decode(errors="replace").strip().rpartition("\n")[2]
                    code = await process.wait()
                    if code == EXIT_MISTAKE:
                        raise InvalidArgument(said.removeprefix("shardworker: "))
                    raise WorkerLost(f"an embedded worker ended with exit code {code} before it listened: {said}")
        except TimeoutError:
            raise WorkerLost(f"an embedded worker did not start within {START_DEADLINE_S:g} s") from None
        # From now on its few log lines are this command's.
        self._copying.append(asyncio.create_task(_copy(process.stderr)))

    async def _stop(self) -> None:
        stopping = asyncio.ensure_future(self._stop_all())
        cancelled: asyncio.CancelledError | None = None
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError as error:
                # Not before everything is gone; it takes `STOP_DEADLINE_S` at most.
                cancelled = error
        if cancelled:
            raise cancelled

    async def _stop_all(self) -> None:
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        await asyncio.gather(*(self._stop_one(process) for process in self._processes))
        for task in self._copying:
            task.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _stop_one(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _copy(stream: asyncio.StreamReader) -> None:
    # Not by lines: one longer than the reader's limit would end this, and later block the worker.
    while data := await stream.read(2**16):
        sys.stderr.write(data.decode(errors="replace"))
