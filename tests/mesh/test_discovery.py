"""Workers that come and go under a coordinator, and coordinators that share them by a lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from coordinator.app import SERVICE, Coordinator
from coordinator.client import GenerationClient
from coordinator.config import DiscoverySettings, ModelSettings, ServeSettings
from coordinator.discovery.neighbours import Neighbours
from coordinator.served_model import ServedModel
from protos.errors import InvalidArgument, MeshError, NotServing
from protos.generation_pb2 import GetMeshResponse
from shardworker.app import RunningWorker, start_worker
from tests.mesh.conftest import Mesh

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("glm4_moe")


class Script:
    """A source that says what the test says."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[tuple[str, ...] | Exception] = asyncio.Queue()
        self.heard = 0

    def say(self, *addresses: str) -> None:
        self._said.put_nowait(addresses)

    def fail(self, error: Exception) -> None:
        self._said.put_nowait(error)

    async def addresses(self) -> AsyncGenerator[tuple[str, ...]]:
        while True:
            said = await self._said.get()
            if isinstance(said, Exception):
                raise said
            yield said
            self.heard += 1


class FakeLease:
    """One side of a lease that the test hands from one to another."""

    name = "test/plan"

    def __init__(self, register: Register) -> None:
        self.register = register
        self.released = 0
        self.heard_shards = True

    @property
    def holder(self) -> str:
        return "the other" if self.register.holder else ""

    @property
    def term(self) -> int | None:
        return self.register.term if self.register.holder is self else None

    @property
    def shards(self) -> int | None:
        return self.register.shards

    async def wait_seen(self) -> None:
        pass

    async def wait_shards(self, known: int | None) -> int | None:
        async with self.register.changed:
            await self.register.changed.wait_for(lambda: self.heard_shards and self.register.shards != known)
        return self.register.shards

    async def ask_shards(self, num_shards: int) -> None:
        await self.register.want(num_shards)

    async def begin_term_after(self, term: int) -> int:
        self.register.term = term + 1
        return term + 1

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        self.released += 1
        if self.register.holder is self:
            self.register.holder = None


class Register:
    """Who holds the lease, and how many shards it says are wanted."""

    def __init__(self) -> None:
        self.holder: FakeLease | None = None
        self.term = 0
        self.shards: int | None = None
        self.changed = asyncio.Condition()

    async def want(self, num_shards: int) -> None:
        self.shards = num_shards
        await self.tell()

    async def tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def give(self, lease: FakeLease) -> None:
        self.holder = lease
        self.term += 1


class Town:
    """Workers, started and stopped one by one, and coordinators among them."""

    def __init__(self, stack: AsyncExitStack, checkpoint: Path, folder: Path) -> None:
        self._stack = stack
        self._checkpoint = checkpoint
        self._folder = folder
        self._num = 0

    def address(self) -> str:
        self._num += 1
        return f"unix:{self._folder}/{self._num}"

    async def worker(self, address: str | None = None) -> RunningWorker:
        worker = await start_worker(address or self.address(), device="cpu", threads=1)
        self._stack.push_async_callback(worker.stop, 0)
        return worker

    def settings(self, *, listen: str = "", insecure: bool = True, **changes: Any) -> ServeSettings:
        discovery = DiscoverySettings("dns:none:1", startup_s=changes.pop("startup_s", None))
        return ServeSettings(
            model=ModelSettings(str(self._checkpoint), dtype="f32", wire="f32"),
            listen=listen or self.address(),
            insecure=insecure,
            **{"shards": 2, "recovery_s": 10.0, "discovery": discovery, **changes},
        )

    async def coordinator(self, settings: ServeSettings, source: Script | None, lease: FakeLease | None = None) -> Mesh:
        coordinator = await Coordinator.start(
            settings, ServedModel.open(settings.model), lambda _: None, neighbours=Neighbours(source, lease)
        )
        self._stack.push_async_callback(coordinator.stop, 0)
        return await self._stack.enter_async_context(Mesh.connect(coordinator, []))


@pytest.fixture
async def town(checkpoint: Path, tmp_path: Path) -> AsyncIterator[Town]:
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        yield Town(stack, checkpoint, tmp_path)


@asynccontextmanager
async def asked(address: str) -> AsyncIterator[GenerationClient]:
    async with GenerationClient(address) as client:
        yield client


async def until(client: GenerationClient, condition: Callable[[GetMeshResponse], bool]) -> GetMeshResponse:
    while not condition(found := await client.mesh()):  # noqa: ASYNC110  # a caller can only ask
        await asyncio.sleep(0.02)
    return found


async def until_listening(client: GenerationClient) -> GetMeshResponse:
    while True:
        try:
            return await client.mesh()
        except MeshError:
            await asyncio.sleep(0.02)


async def until_logged(lines: Sequence[MutableMapping[str, Any]], text: str) -> None:
    while not any(text in line.get("error", "") for line in lines):  # noqa: ASYNC110  # there is no event for it
        await asyncio.sleep(0.02)


def serving(found: GetMeshResponse) -> set[str]:
    return {worker.address for worker in found.workers if worker.serving}


def listed(found: GetMeshResponse) -> list[str]:
    return [worker.address for worker in found.workers]


async def health(client: GenerationClient) -> int:
    stub = health_pb2_grpc.HealthStub(client._channel.current())
    return (await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status  # type: ignore[no-any-return]


async def test_a_coordinator_waits_until_there_are_enough_workers(town: Town) -> None:
    source, settings = Script(), town.settings()
    source.say()
    with capture_logs() as lines:
        starting = asyncio.create_task(town.coordinator(settings, source))
        async with asked(settings.listen) as client:
            found = await until_listening(client)
            assert (found.serving, found.num_shards, listed(found)) == (False, 2, [])
            assert await health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
            first = await town.worker()
            source.say(first.address)
            found = await until(client, lambda found: bool(listed(found)))
            assert (found.serving, listed(found)) == (False, [first.address])
            with pytest.raises(NotServing, match="the workers are loading"):
                await Mesh(None, [], client).generate(PROMPT, 4)  # type: ignore[arg-type]
            second = await town.worker()
            source.say(first.address, second.address)
            mesh = await starting
            assert serving(await client.mesh()) == {first.address, second.address}
            assert await health(client) == health_pb2.HealthCheckResponse.SERVING
            assert len((await mesh.generate(PROMPT, 4)).tokens) == 4
    waits = [line["error"] for line in lines if line["event"] == "no mesh yet"]
    assert waits == [f"2 shards need 2 workers, found {number}: waiting for more" for number in (0, 1)]


async def test_a_start_that_takes_too_long_ends_with_one_line(town: Town) -> None:
    worker = await town.worker()
    source = Script()
    source.say(worker.address)
    with pytest.raises(NotServing, match=r"no mesh within 0\.01 s \(--startup-timeout\): 2 shards need 2 workers, found 1"):
        await town.coordinator(town.settings(startup_s=0.01), source)


async def test_a_source_that_can_never_answer_ends_the_start(town: Town) -> None:
    source = Script()
    source.fail(InvalidArgument("no KUBECONFIG"))
    with pytest.raises(InvalidArgument, match="no KUBECONFIG"):
        await town.coordinator(town.settings(), source)


async def test_listed_workers_that_start_later_are_waited_for(town: Town) -> None:
    first, second = town.address(), town.address()
    settings = town.settings(workers=(first, second), discovery=DiscoverySettings(startup_s=30))
    starting = asyncio.create_task(town.coordinator(settings, None))
    await town.worker(first)
    async with asked(settings.listen) as client:
        await until_listening(client)
        await town.worker(second)
        assert len((await (await starting).generate(PROMPT, 4)).tokens) == 4


async def test_a_mesh_that_serves_is_not_disturbed_by_newcomers_who_take_over_when_it_breaks(town: Town) -> None:
    first, second, third = [await town.worker() for _ in range(3)]
    source = Script()
    source.say(first.address, second.address)
    mesh = await town.coordinator(town.settings(), source)
    expected = (await mesh.generate(PROMPT, 40)).tokens
    source.say(first.address, third.address, second.address)
    found = await until(mesh.client, lambda found: len(found.workers) == 3)
    assert (found.epoch, serving(found)) == (1, {first.address, second.address})
    stream = asyncio.create_task(mesh.generate(PROMPT, 40))
    await second.stop(0)
    assert (await stream).tokens == expected
    found = await mesh.client.mesh()
    assert (found.epoch, serving(found)) == (2, {first.address, third.address})


async def test_a_worker_that_went_away_serves_on_and_is_asked_no_more(town: Town) -> None:
    first, second, third = [await town.worker() for _ in range(3)]
    source = Script()
    source.say(first.address, second.address)
    mesh = await town.coordinator(town.settings(), source)
    expected = (await mesh.generate(PROMPT, 40)).tokens
    source.say(third.address, first.address)
    found = await until(mesh.client, lambda found: listed(found) == [third.address, first.address])
    assert (found.epoch, found.serving) == (1, True)
    assert (await mesh.generate(PROMPT, 40)).tokens == expected
    assert (await mesh.client.mesh()).epoch == 1
    await second.stop(0)
    assert (await mesh.generate(PROMPT, 40)).tokens == expected
    found = await mesh.client.mesh()
    assert (found.epoch, serving(found)) == (2, {first.address, third.address})
    # Only now is its channel closed; nothing is left of it.
    assert set(mesh.coordinator._pool._roster.engaged) == {first.address, third.address}


async def test_all_workers_are_replaced_by_others_with_other_addresses_while_streams_go_on(town: Town) -> None:
    workers = [await town.worker() for _ in range(2)]
    source = Script()
    source.say(*(worker.address for worker in workers))
    mesh = await town.coordinator(town.settings(), source)
    expected = (await mesh.generate(PROMPT, 60)).tokens
    stream = asyncio.create_task(mesh.generate(PROMPT, 60))
    for worker in workers:
        await worker.stop(0)
    source.say()
    await until(mesh.client, lambda found: not found.serving and not found.workers)
    newcomers = [await town.worker() for _ in range(2)]
    source.say(*(worker.address for worker in newcomers))
    assert (await stream).tokens == expected


async def test_coordinators_with_a_lease_adopt_the_plan_of_its_holder(town: Town) -> None:
    workers = [await town.worker() for _ in range(3)]
    register, sources = Register(), [Script(), Script()]
    leases = [FakeLease(register) for _ in range(2)]
    for source in sources:
        source.say(*(worker.address for worker in workers))
    follower_settings = town.settings()
    with capture_logs() as lines:
        waiting = asyncio.create_task(town.coordinator(follower_settings, sources[1], leases[1]))
        async with asked(follower_settings.listen) as client:
            await until_listening(client)
            # Nobody holds the lease yet: nothing is loaded.
            await until_logged(lines, "may hand it out")
            assert all(not worker._holding.assignment for worker in workers)
    register.give(leases[0])
    leader = await town.coordinator(town.settings(), sources[0], leases[0])
    follower = await waiting
    expected = (await leader.generate(PROMPT, 40)).tokens
    assert (await follower.generate(PROMPT, 40)).tokens == expected
    assert serving(await follower.client.mesh()) == serving(await leader.client.mesh())
    assert {worker._holding.assignment for worker in workers[:2]} == {register.term << 32}

    # A worker dies: the holder hands out its shard again, and both go on with the spare.
    streams = [asyncio.create_task(mesh.generate(PROMPT, 40)) for mesh in (leader, follower)]
    await workers[0].stop(0)
    assert [(await stream).tokens for stream in streams] == [expected, expected]
    remaining = {worker.address for worker in workers[1:]}
    for mesh in (leader, follower):
        assert serving(await mesh.client.mesh()) == remaining

    # The holder goes: no stream of the other is lost, and whoever gets the lease hands out plans.
    stream = asyncio.create_task(follower.generate(PROMPT, 40))
    await leader.coordinator.stop(0)
    assert leases[0].released == 1
    assert register.holder is None
    assert (await stream).tokens == expected
    assert (await follower.client.mesh()).recovery.recoveries == 1
    newcomer = await town.worker()
    sources[1].say(workers[1].address, workers[2].address, newcomer.address)
    stream = asyncio.create_task(follower.generate(PROMPT, 40))
    await workers[1].stop(0)
    register.give(leases[1])
    assert (await stream).tokens == expected
    assert newcomer._holding.assignment == register.term << 32


async def test_a_coordinator_with_another_plan_says_so_once_and_touches_nothing(town: Town) -> None:
    workers = [await town.worker() for _ in range(2)]
    register, sources = Register(), [Script(), Script()]
    leases = [FakeLease(register) for _ in range(2)]
    for source in sources:
        source.say(*(worker.address for worker in workers))
    register.give(leases[0])
    leader = await town.coordinator(town.settings(), sources[0], leases[0])
    with capture_logs() as lines:
        other_settings = town.settings(shards=1)
        other = asyncio.create_task(town.coordinator(other_settings, sources[1], leases[1]))
        async with asked(other_settings.listen) as client:
            await until_listening(client)
            await until_logged(lines, "workers hold plan")
            assert len((await leader.generate(PROMPT, 8)).tokens) == 8
            assert (await leader.client.mesh()).epoch == 1
            with pytest.raises(NotServing):
                await Mesh(None, [], client).generate(PROMPT, 4)  # type: ignore[arg-type]
        # It is the holder's turn to wait as soon as the lease goes over.
        register.give(leases[1])
        mesh = await other
    assert len((await mesh.generate(PROMPT, 8)).tokens) == 8
    mismatches = [line["error"] for line in lines if line["event"] == "no mesh yet" and line["reason"] == "PLAN_MISMATCH"]
    assert len(set(mismatches)) == len(mismatches)
    assert "need the same --model, --dtype and --quantize, and want the same number of shards" in mismatches[0]


async def test_a_new_lease_begins_above_the_terms_that_workers_have_seen(town: Town) -> None:
    workers = [await town.worker() for _ in range(2)]
    for number in range(2):
        register, source = Register(), Script()
        lease = FakeLease(register)
        register.give(lease)
        source.say(*(worker.address for worker in workers))
        # The first is of term 7, and another plan is handed out under a lease that counts from 1.
        register.term = 7 if number == 0 else 1
        mesh = await town.coordinator(town.settings(shards=2 - number), source, lease)
        assert len((await mesh.generate(PROMPT, 4)).tokens) == 4
        await mesh.coordinator.stop(0)
    assert workers[0]._holding.assignment >> 32 == 8


@pytest.mark.parametrize("late", [0, 1])
async def test_coordinators_with_a_lease_change_the_number_of_shards_together(town: Town, late: int) -> None:
    workers = [await town.worker() for _ in range(4)]
    register, sources = Register(), [Script(), Script()]
    leases = [FakeLease(register) for _ in range(2)]
    for source in sources:
        source.say(*(worker.address for worker in workers))
    register.give(leases[0])
    meshes = [await town.coordinator(town.settings(), sources[number], leases[number]) for number in range(2)]
    expected = (await meshes[0].generate(PROMPT, 150)).tokens
    streams = [asyncio.create_task(mesh.generate(PROMPT, 150)) for mesh in meshes]
    for mesh in meshes:
        await until(mesh.client, lambda found: found.load.running == 1)
    # One of them hears of it later: the other changes, or waits until the holder has handed out the plan.
    leases[late].heard_shards = False
    await meshes[1 - late].client.reshard(4)
    if late == 1:
        await until(meshes[0].client, lambda found: found.num_shards == 4 and found.serving)
    else:
        await until(meshes[1].client, lambda found: "want the same number of shards" in found.reshard_obstacle)
    found = await meshes[late].client.mesh()
    assert (found.serving, found.num_shards, found.wanted_shards) == (True, 2, 2)
    leases[late].heard_shards = True
    await register.tell()
    for mesh in meshes:
        found = await until(mesh.client, lambda found: found.num_shards == 4 and found.serving)
        assert (found.recovery.reshards, found.recovery.recoveries) == (1, 0)
    assert [(await stream).tokens for stream in streams] == [expected, expected]
    for mesh in meshes:
        assert (await mesh.generate(PROMPT, 150)).tokens == expected
    # All sessions of the former plan are over.
    assert not any(worker._holding.held().former for worker in workers)


async def test_the_lease_says_how_many_shards_where_no_flag_does(town: Town) -> None:
    workers = [await town.worker() for _ in range(3)]
    register, source = Register(), Script()
    lease = FakeLease(register)
    register.give(lease)
    source.say(*(worker.address for worker in workers))
    settings = town.settings(shards=None, discovery=DiscoverySettings("dns:none:1", lease="test/plan", startup_s=None))
    starting = asyncio.create_task(town.coordinator(settings, source, lease))
    await asyncio.sleep(0.05)
    assert not starting.done()
    await register.want(3)
    mesh = await starting
    assert (await mesh.client.mesh()).num_shards == 3
    # What the model does not allow is told, and the mesh serves on.
    await register.want(99)
    found = await until(mesh.client, lambda found: bool(found.reshard_obstacle))
    assert (found.serving, found.num_shards, found.wanted_shards) == (True, 3, 3)
    await register.want(1)
    await until(mesh.client, lambda found: found.num_shards == 1 and found.serving and not found.reshard_obstacle)


async def test_a_lease_that_never_says_how_many_shards_ends_the_start(town: Town) -> None:
    lease = FakeLease(Register())
    discovery = DiscoverySettings("dns:none:1", lease="test/plan", startup_s=0.05)
    with pytest.raises(NotServing, match="Lease test/plan does not say how many shards are wanted"):
        await town.coordinator(town.settings(shards=None, discovery=discovery), Script(), lease)


async def test_streams_of_a_coordinator_that_drains_outlive_all_its_workers(town: Town) -> None:
    workers = [await town.worker() for _ in range(2)]
    register, source = Register(), Script()
    lease = FakeLease(register)
    register.give(lease)
    source.say(*(worker.address for worker in workers))
    mesh = await town.coordinator(town.settings(), source, lease)
    expected = (await mesh.generate(PROMPT, 60)).tokens
    stream = asyncio.create_task(mesh.generate(PROMPT, 60))
    await until(mesh.client, lambda found: found.load.running == 1)
    leaving = asyncio.create_task(mesh.coordinator.stop(30))
    # As in an upgrade of everything: workers are replaced while the only coordinator lets its streams run out.
    for worker in workers:
        await worker.stop(0)
    newcomers = [await town.worker() for _ in range(2)]
    source.say(*(worker.address for worker in newcomers))
    assert (await stream).tokens == expected
    await leaving
    assert lease.released == 1
