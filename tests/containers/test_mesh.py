"""A mesh of containers on a network of its own: it generates, outlives the death of a worker, and ends when it is told to."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from tests.containers.engine import COORDINATOR, SOME_USER, WORKER, Container, Containers
from tests.faults.streams import GREEDY_STREAM, SEEDED_STREAM, Caller, Outcome, Stream, differences
from tests.faults.waiting import wait_until
from tests.smollm2 import SMOLLM2, needs_smollm2

pytestmark = [pytest.mark.containers, needs_smollm2]

START_S = 60.0
"""Longest from the first container to the first token."""
GRACE_S = 40
STREAMS = tuple(Stream(stream.name, stream.prompt, 48, stream.sampling) for stream in (GREEDY_STREAM, SEEDED_STREAM))
KILLED_AT = 8
"""Tokens of the first stream."""


def tell(what: str, seconds: float) -> None:
    """Print a measured figure; pytest shows it with -rP."""
    print(f"{what}: {seconds:.2f} s")  # noqa: T201  # the figures are half of what these tests are for


class Mesh:
    """A coordinator and its workers."""

    def __init__(self, containers: Containers, num_workers: int) -> None:
        """Start them; the coordinator makes two shards of however many workers there are."""
        self._containers = containers
        names = [f"worker-{number}" for number in range(num_workers)]
        self.workers = {name: self.start_worker(name) for name in names}
        self.coordinator = containers.run(
            "coordinator",
            COORDINATOR,
            *("serve", "--model=/model", "--listen=0.0.0.0:7000", "--shards=2", "--insecure"),
            "--workers=" + ",".join(f"{name}:7001" for name in names),
            publish=7000,
        )
        self.address = self.coordinator.published(7000)

    def start_worker(self, name: str) -> Container:
        return self._containers.run(name, WORKER, "serve", "--listen=0.0.0.0:7001", "--threads=1", "--insecure")

    async def shard_holders(self, caller: Caller) -> list[str]:
        return [worker.address.removesuffix(":7001") for worker in (await caller.mesh()).workers if worker.serving]


@pytest.fixture
def containers() -> Iterator[Containers]:
    with Containers(SMOLLM2) as running:
        yield running


async def serve(containers: Containers, num_workers: int) -> Mesh:
    """Start a mesh and wait for its first token."""
    started_s = time.monotonic()
    mesh = Mesh(containers, num_workers)
    await mesh.coordinator.wait_printed("serving /model", START_S)
    async with Caller(mesh.address) as caller:
        first = await caller.generate(Stream("first", GREEDY_STREAM.prompt, 1))
    assert len(first.tokens) == 1, first
    took_s = time.monotonic() - started_s
    tell("from the first container to the first token", took_s)
    assert took_s < START_S
    return mesh


async def generate_and(caller: Caller, act: Callable[[], None]) -> dict[str, Outcome]:
    """Run the streams, and do something once the first of them has got some tokens."""
    reached = asyncio.Event()

    def watch(outcome: Outcome) -> None:
        if len(outcome.tokens) >= KILLED_AT:
            reached.set()

    running = asyncio.create_task(caller.generate_all(STREAMS, watch))
    await reached.wait()
    await asyncio.to_thread(act)
    return await running


@pytest.mark.parametrize(("num_workers", "comes_back"), [(2, True), (3, False)], ids=["restarted", "spare"])
async def test_streams_outlive_the_death_of_a_worker(containers: Containers, num_workers: int, comes_back: bool) -> None:
    mesh = await serve(containers, num_workers)
    async with Caller(mesh.address) as caller:
        expected = await caller.generate_all(STREAMS)
        victim = (await mesh.shard_holders(caller))[0]

        def kill() -> None:
            mesh.workers[victim].kill()
            if comes_back:
                mesh.workers[victim].start()

        found = await generate_and(caller, kill)
        assert [text for stream in STREAMS for text in differences(stream, found[stream.name], expected[stream.name])] == []
        assert (await caller.mesh()).epoch > 1
        assert (victim in await mesh.shard_holders(caller)) == comes_back
    for outcome in found.values():
        tell("pause of a stream", outcome.longest_pause_s)


async def test_everything_runs_closed_and_ends_by_sigterm(containers: Containers) -> None:
    mesh = await serve(containers, 2)
    for container in (mesh.coordinator, *mesh.workers.values()):
        # Of the program itself, not of another that podman starts beside it.
        user, first = container.execute(
            "sh", "-c", 'awk \'/^Uid:/ {print $2}\' /proc/1/status; tr "\\0" " " </proc/1/cmdline'
        ).split("\n")
        assert user == str(SOME_USER)
        assert " serve " in first
    async with Caller(mesh.address) as caller:
        expected = await caller.generate_all(STREAMS)
        stopped: list[float] = []
        found = await generate_and(caller, lambda: stopped.append(mesh.coordinator.stop(GRACE_S)))
    assert [text for stream in STREAMS for text in differences(stream, found[stream.name], expected[stream.name])] == []
    assert mesh.coordinator.state["ExitCode"] == 0
    tell("end of a coordinator, two streams running", stopped[0])
    for worker in mesh.workers.values():
        tell("end of a worker", worker.stop(GRACE_S))
        assert worker.state["ExitCode"] == 0


async def test_a_coordinator_that_was_killed_finds_its_workers_again(containers: Containers) -> None:
    mesh = await serve(containers, 2)
    mesh.coordinator.kill()
    started_s = time.monotonic()
    mesh.coordinator.start()
    async with Caller(mesh.coordinator.published(7000)) as caller:
        await wait_until("the coordinator to serve again", caller.serving, START_S)
        outcome = await caller.generate(STREAMS[0])
    assert len(outcome.tokens) == STREAMS[0].max_tokens
    tell("from the new start of a coordinator to the end of a stream", time.monotonic() - started_s)
