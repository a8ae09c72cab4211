"""Meshes that break, and what becomes of the requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from coordinator import supervisor
from coordinator.completion import Completion
from coordinator.engine import Engine
from coordinator.request import Request
from coordinator.sampler import Choice
from coordinator.scheduler import SUSPECT_AFTER, Limits, Step
from coordinator.sequence import Sequence
from coordinator.supervisor import Supervisor
from protos import rpc
from protos.errors import MeshError, NotServing, WorkerLost, WrongResult
from protos.tensor_pb2 import DTYPE_F32

CANARY = "canary"


class FakeMesh:
    """A fan-out of two workers that lasts for so many steps of callers, in which `poison` is the first token of no request."""

    def __init__(self, epoch: int, steps: float, error: Exception | None = None, *, canary: int = 1, poison: int = -1) -> None:
        self.epoch, self.steps, self.closed = epoch, steps, False
        self.error = error or WorkerLost(f"worker died in epoch {epoch}", shards=(1,))
        self.addresses = (f"a{epoch}", f"b{epoch}")
        self.canary, self.poison = canary, poison
        self.broken = asyncio.Event()
        self.rows: list[list[int]] = []

    def close(self) -> None:
        self.closed = True

    async def watch(self) -> None:
        await self.broken.wait()
        raise WorkerLost("the session ended", shards=(0,))


class FakeForward:
    def __init__(self, spec: Any, resident: Any, fanout: FakeMesh, wire: int) -> None:
        del spec, resident, wire
        self.mesh = fanout

    async def run(self, step: Step, number: int) -> torch.Tensor:
        del number
        mesh = self.mesh
        await asyncio.sleep(0)
        assert not mesh.closed
        if step.rows[0].sequence.request.request_id == CANARY:
            if not mesh.canary:
                raise WorkerLost(f"the canary died in epoch {mesh.epoch}", shards=(0,))
        else:
            mesh.rows.append([rows.sequence.request.prompt[0] for rows in step.rows])
            mesh.steps -= 1
            if mesh.steps < 0 or mesh.poison in mesh.rows[-1]:
                raise mesh.error
        return torch.full((sum(rows.samples for rows in step.rows), 1), mesh.canary)


class FakeHead:
    def __init__(self, *_: Any) -> None:
        pass

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        del step
        if sequences[0].request.request_id == CANARY:
            return [Choice(1, -0.5, ((int(hidden[0]), -0.5), (0, -0.9)))]
        return [Choice(sequence.num_tokens) for sequence in sequences]


class Scene:
    """A supervisor, and the meshes that it will be given: a mesh, or why there is none."""

    def __init__(self, meshes: list[FakeMesh | Exception], recovery_s: float) -> None:
        self.engine = Engine(Limits(num_pages=100, page_tokens=4), vocabulary=100, context=400)
        self.meshes = meshes
        self.serving: list[str] = []
        self.blamed: list[str] = []
        self.exhausted = asyncio.Event()
        self.whole = asyncio.Event()
        self.supervisor = Supervisor(
            engine=self.engine,
            spec=None,  # type: ignore[arg-type]
            resident=None,  # type: ignore[arg-type]
            wire=DTYPE_F32,
            shard_vocabularies=(),
            assemble=self._assemble,  # type: ignore[arg-type]
            wait_changed=lambda _: asyncio.sleep(0),
            blame=lambda _, addresses: self.blamed.extend(addresses),
            on_serving=self._note,  # type: ignore[arg-type]
            recovery_s=recovery_s,
        )

    async def _assemble(self) -> FakeMesh:
        await asyncio.sleep(0)
        if not self.meshes:
            self.exhausted.set()
            raise WorkerLost("nobody is there")
        mesh = self.meshes.pop(0)
        if isinstance(mesh, Exception):
            raise mesh
        return mesh

    async def _note(self, fanout: FakeMesh | None) -> None:
        self.serving.append(fanout.addresses[0] if fanout else "")
        if fanout:
            self.whole.set()


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Forward", FakeForward)
    monkeypatch.setattr(supervisor, "Head", FakeHead)


@asynccontextmanager
async def supervised(*meshes: FakeMesh | Exception, recovery_s: float = 100.0) -> AsyncIterator[Scene]:
    scene = Scene(list(meshes), recovery_s)
    first = await scene.supervisor.start()
    task = asyncio.create_task(scene.supervisor.run(first))
    try:
        yield scene
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await task


async def collect(completion: Completion) -> list[int]:
    async with asyncio.timeout(5):
        return [choice.token async for choice in completion.tokens()]


async def test_requests_go_on_with_the_same_tokens_on_another_mesh() -> None:
    first, second, third = FakeMesh(1, 3), FakeMesh(2, 2), FakeMesh(3, 1e9)
    async with supervised(first, second, WorkerLost("not yet"), third) as scene:
        completions = [scene.engine.submit(Request("r", (0,) * length, 10)) for length in (1, 5)]
        assert await asyncio.gather(*map(collect, completions)) == [list(range(1, 11)), list(range(5, 15))]
        assert (first.closed, second.closed, third.closed) == (True, True, False)
        assert scene.serving == ["a1", "", "a2", "", "a3"]
        assert scene.blamed == ["b1", "b2"]
        assert scene.engine.refusal is None
        recoveries = scene.supervisor.recoveries
        assert (recoveries.count, recoveries.failures) == (2, {"WORKER_LOST": 2})
        latest = recoveries.latest
        assert latest is not None
        assert min(latest.detect_ns, latest.assemble_ns, latest.canary_ns, latest.replay_ns) > 0
        assert (latest.failure, latest.obstacle) == ("worker died in epoch 2", "not yet")


async def test_a_mesh_that_breaks_while_nobody_asks_is_replaced_at_once() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, second) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.whole.clear()
        first.broken.set()
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert scene.serving == ["a1", "", "a2"]
        assert scene.blamed == ["a1"]
        assert scene.supervisor.recoveries.latest is not None
        assert scene.supervisor.recoveries.latest.detect_ns == 0
        assert await collect(scene.engine.submit(Request("r", (1,), 3))) == [1, 2, 3]


async def test_the_canary_of_an_idle_mesh_finds_that_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "CANARY_S", 0.01)
    first = FakeMesh(1, 1e9)
    async with supervised(first, FakeMesh(2, 1e9)) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.whole.clear()
        first.canary = 0
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert scene.serving == ["a1", "", "a2"]


async def test_a_first_mesh_whose_canary_dies_serves_nobody() -> None:
    mesh = FakeMesh(1, 1e9, canary=0)
    with pytest.raises(WorkerLost, match="the canary died"):
        async with supervised(mesh):
            pass
    assert mesh.closed


async def test_a_mesh_with_another_canary_never_serves_and_newcomers_are_blamed() -> None:
    first, liar, sound = FakeMesh(1, 2), FakeMesh(2, 1e9, canary=7), FakeMesh(3, 1e9)
    liar.addresses = (first.addresses[0], "newcomer")
    async with supervised(first, liar, sound) as scene:
        assert await collect(scene.engine.submit(Request("r", (0,), 10))) == list(range(1, 11))
        assert scene.serving == ["a1", "", "a3"]
        assert scene.blamed == ["b1", "newcomer"]
        assert liar.closed
        assert not liar.rows


async def test_requests_end_with_not_serving_when_no_mesh_can_be_had() -> None:
    async with supervised(FakeMesh(1, 2), recovery_s=0.02) as scene:
        completion = scene.engine.submit(Request("r", (1,), 10))
        with pytest.raises(NotServing, match="no full mesh: nobody is there"):
            await collect(completion)
        with pytest.raises(NotServing, match="no full mesh"):
            scene.engine.submit(Request("r", (1,), 10))


async def test_requests_do_not_wait_longer_than_stated_for_a_mesh_that_loads_and_loads() -> None:
    async with supervised(FakeMesh(1, 2), recovery_s=0.02) as scene:
        loading = asyncio.Event()

        async def assemble() -> FakeMesh:
            await loading.wait()
            return FakeMesh(2, 1e9)

        scene.supervisor.assemble = assemble  # type: ignore[assignment]
        with pytest.raises(NotServing, match="no full mesh: worker died in epoch 1"):
            await collect(scene.engine.submit(Request("r", (1,), 10)))
        scene.whole.clear()
        loading.set()
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert await collect(scene.engine.submit(Request("r", (1,), 3))) == [1, 2, 3]


async def test_mesh_that_comes_back_after_giving_up_serves_again() -> None:
    async with supervised(FakeMesh(1, 2), recovery_s=0.0) as scene:
        completion = scene.engine.submit(Request("r", (1,), 10))
        # Without recovery the requests end at once, with what broke the mesh.
        with pytest.raises(NotServing, match="no full mesh: worker died in epoch 1"):
            await collect(completion)
        await asyncio.wait_for(scene.exhausted.wait(), 5)
        scene.whole.clear()
        scene.meshes.append(FakeMesh(2, 1e9))
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert scene.engine.refusal is None
        assert await collect(scene.engine.submit(Request("r", (1,), 3))) == [1, 2, 3]


async def test_a_request_that_breaks_mesh_after_mesh_ends_alone() -> None:
    error = WrongResult("NaN")
    meshes = [FakeMesh(epoch, 1e9, error, poison=66) for epoch in range(1, 9)]
    async with supervised(*meshes) as scene:
        innocent = [scene.engine.submit(Request("r", (number,), 10)) for number in (1, 2)]
        guilty = scene.engine.submit(Request("bad", (66,), 10))
        results = await asyncio.gather(*map(collect, innocent), collect(guilty), return_exceptions=True)
        assert results[:2] == [list(range(1, 11))] * 2
        assert isinstance(results[2], WrongResult)
        # In company until it was suspected, alone twice, and never again.
        assert [mesh.rows[-1] for mesh in meshes[:SUSPECT_AFTER]] == [[1, 2, 66]] * SUSPECT_AFTER
        assert scene.supervisor.recoveries.count == SUSPECT_AFTER + 2
        assert sum(rows == [66] for mesh in meshes for rows in mesh.rows) == 2


async def test_failures_with_progress_between_them_are_forgiven() -> None:
    meshes = [FakeMesh(epoch, 1) for epoch in range(1, 13)]
    async with supervised(*meshes, FakeMesh(99, 1e9)) as scene:
        assert len(await collect(scene.engine.submit(Request("r", (1,), 30)))) == 30


async def test_defect_ends_the_requests_before_it_is_raised() -> None:
    scene = Scene([FakeMesh(1, 1, RuntimeError("a defect"))], 100.0)
    task = asyncio.create_task(scene.supervisor.run(await scene.supervisor.start()))
    completion = scene.engine.submit(Request("r", (1,), 10))
    with pytest.raises(MeshError, match="internal error; the coordinator's log has the details"):
        await collect(completion)
    with pytest.raises(RuntimeError, match="a defect"):
        await task
    with pytest.raises(NotServing):
        scene.engine.submit(Request("r", (1,), 10))


async def test_mesh_is_closed_when_the_supervisor_is_cancelled() -> None:
    mesh = FakeMesh(1, 1e9)
    async with supervised(mesh) as scene:
        await collect(scene.engine.submit(Request("r", (1,), 2)))
    assert mesh.closed
