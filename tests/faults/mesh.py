"""A mesh of real processes on loopback whose every part can be broken, and mended again.

    coordinator --- link (TCP) --- proxy (gRPC) --- worker (unix socket)

A link is what happens to a network, a proxy sees steps and may change what is said, and a worker is a process with signals.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from protos.shardworker_pb2 import DescribeRequest, DescribeResponse, ReleaseRequest
from protos.shardworker_pb2_grpc import ShardWorkerStub
from tests.faults.link import Link
from tests.faults.programs import Program, Programs
from tests.faults.proxy import WorkerProxy
from tests.faults.streams import Caller
from tests.faults.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

SERVING_S = 60.0
"""Longest from a mesh that can be had to one that serves."""
ROUND_TIMEOUT_S = 1.5
"""Of the coordinators here: a hang is noticed after so long."""
CALL_S = 10.0
"""For an answer of a worker that is well."""
MAX_ROWS = 24
"""Of a step: so few that a long prompt is read while the other streams decode."""


class Worker:
    """A worker process, and the way to it."""

    def __init__(self, programs: Programs, number: int, *, direct: bool = False) -> None:
        """Start the process; whoever does enters the contexts of proxy and link, unless the way is `direct`."""
        self.number = number
        self._direct = direct
        self._programs = programs
        self._socket = programs.directory / f"w{number}"
        proxied = programs.directory / f"p{number}"
        self.proxy = WorkerProxy(f"unix:{proxied}", f"unix:{self._socket}")
        self.link = Link(str(proxied))
        self.program = self.start()

    @property
    def address(self) -> str:
        """For coordinators."""
        return f"unix:{self._socket}" if self._direct else self.link.address

    def start(self) -> Program:
        """Start the process, again if it ended."""
        arguments = ("shardworker", "serve", "--listen", f"unix:{self._socket}", "--threads", "1")
        self.program = self._programs.start(f"worker-{self.number}", *arguments)
        return self.program

    async def wait_listening(self) -> None:
        """Wait until the process serves."""
        await self.program.wait_printed("listening on")
        await self.proxy.reconnect()

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.program.kill()

    def freeze(self) -> None:
        """Stop the process by SIGSTOP."""
        self.program.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue the process by SIGCONT."""
        self.program.send(signal.SIGCONT)

    async def describe(self) -> DescribeResponse:
        """Ask the process itself, past link and proxy."""
        async with grpc.aio.insecure_channel(f"unix:{self._socket}") as channel:
            response: DescribeResponse = await ShardWorkerStub(channel).Describe(DescribeRequest(), timeout=CALL_S)
        return response

    async def release(self) -> None:
        """Have the process hold nothing."""
        assignment = (await self.describe()).held.assignment
        async with grpc.aio.insecure_channel(f"unix:{self._socket}") as channel:
            await ShardWorkerStub(channel).Release(ReleaseRequest(assignment=max(1, assignment)), timeout=CALL_S)

    async def mend(self) -> None:
        """Take back whatever was done to process, proxy and link."""
        self.proxy.clear()
        self.link.release()
        self.link.delay_s, self.link.refuses = 0.0, False
        if self.program.alive:
            self.thaw()
        else:
            self.start()
            await self.wait_listening()


class Coordinator:
    """A coordinator process."""

    def __init__(
        self,
        programs: Programs,
        name: str,
        model: Path,
        *,
        addresses: Sequence[str],
        flags: Mapping[str, object],
        inside: Sequence[str] = (),
        module: str = "coordinator",
    ) -> None:
        """Start it.

        Args:
            programs: that it becomes one of.
            name: of its socket and its log.
            model: folder.
            addresses: of all workers that it may use, spares included.
            flags: of `coordctl serve`, without dashes.
            inside: a command that runs another.
            module: whose main is the coordinator's, or begins with it.

        """
        self.address = f"unix:{programs.directory / name}"
        settings: dict[str, object] = {
            "model": model,
            "listen": self.address,
            "workers": ",".join(addresses),
            "shards": 2,
            "dtype": "f32",
            "wire": "f32",
            "kv-tokens": 8192,
            "max-rows": MAX_ROWS,
            "max-running": 16,
            "round-timeout": ROUND_TIMEOUT_S,
            **flags,
        }
        # A switch is True.
        arguments = [part for key, value in settings.items() for part in (f"--{key}", *([] if value is True else [str(value)]))]
        self.program = programs.start(name, module, "serve", *arguments, "--insecure", inside=inside)

    async def wait_serving(self, caller: Caller) -> None:
        """Wait until a full mesh serves."""
        await self.program.wait_printed("serving ")
        await wait_until(f"{self.address} to be SERVING", caller.serving, SERVING_S)


class Mesh:
    """Workers, and the coordinators that tests start on them."""

    def __init__(self, programs: Programs, model: Path, workers: list[Worker]) -> None:
        """Made by `mesh_of`."""
        self.programs = programs
        self.model = model
        self.workers = workers
        self._num_coordinators = 0

    @asynccontextmanager
    async def coordinator(
        self, name: str = "", /, module: str = "coordinator", **flags: object
    ) -> AsyncIterator[tuple[Coordinator, Caller]]:
        """Start a coordinator and wait until it serves; underscores in flags stand for dashes."""
        self._num_coordinators += 1
        name = name or f"c{self._num_coordinators}"
        changes = {key.replace("_", "-"): value for key, value in flags.items()}
        addresses = [worker.address for worker in self.workers]
        coordinator = Coordinator(self.programs, name, self.model, addresses=addresses, flags=changes, module=module)
        try:
            async with Caller(coordinator.address) as caller:
                await coordinator.wait_serving(caller)
                yield coordinator, caller
        finally:
            coordinator.program.kill()

    def count_from_here(self) -> None:
        """Take up all traps, and begin to count steps at 0."""
        for worker in self.workers:
            worker.proxy.clear()
            worker.proxy.count_from_here()

    async def serving(self, caller: Caller) -> list[Worker]:
        """Give the workers that are shards of a coordinator's mesh, in shard order."""
        described = await caller.mesh()
        by_address = {worker.address: worker for worker in self.workers}
        shards = sorted((one for one in described.workers if one.serving), key=lambda one: one.shard)
        return [by_address[one.address] for one in shards]

    async def mend(self, caller: Caller | None = None) -> None:
        """Make whole what was broken; then wait until the coordinator serves and all workers answer it."""
        await asyncio.gather(*(worker.mend() for worker in self.workers))
        if caller:
            await wait_until("the coordinator to be SERVING again", caller.serving, SERVING_S)
            await wait_until("all workers to be reachable", lambda: self._all_reachable(caller), SERVING_S)

    @staticmethod
    async def _all_reachable(caller: Caller) -> bool:
        return all(worker.reachable for worker in (await caller.mesh()).workers)


@asynccontextmanager
async def mesh_of(model: Path, num_workers: int, *, direct: bool = False) -> AsyncIterator[Mesh]:
    """Start workers; whatever was started ends with the context.

    Args:
        model: folder.
        num_workers: spares included.
        direct: with neither link nor proxy, so that what is measured is the mesh.

    """
    # Sockets need a short path.
    directory = Path(tempfile.mkdtemp(prefix="shardmesh-faults-"))
    try:
        with Programs(directory) as programs:
            async with AsyncExitStack() as stack:
                workers = [Worker(programs, number, direct=direct) for number in range(num_workers)]
                for worker in () if direct else workers:
                    await stack.enter_async_context(worker.proxy)
                    await stack.enter_async_context(worker.link)
                for worker in workers:
                    await worker.wait_listening()
                yield Mesh(programs, model, workers)
    finally:
        shutil.rmtree(directory)
