"""Meshes that break, and what becomes of the requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from coordinator import supervisor
from coordinator.engine import Completion, Engine
from coordinator.microbatches import LIMIT
from coordinator.request import Request
from coordinator.sampler import Choice
from coordinator.scheduler import Limits, Step
from coordinator.sequence import Sequence
from coordinator.supervisor import MAX_FAILURES, Supervisor
from protos.errors import MeshError, NotServing, WorkerLost
from protos.tensor_pb2 import DTYPE_F32


class FakeMesh:
    """A fan-out that lasts for so many steps."""

    def __init__(self, epoch: int, steps: float, error: Exception | None = None) -> None:
        self.epoch, self.steps, self.closed = epoch, steps, False
        self.error = error or WorkerLost(f"worker died in epoch {epoch}")

    def close(self) -> None:
        self.closed = True


class FakeForward:
    def __init__(self, spec: Any, resident: Any, fanout: FakeMesh, wire: int) -> None:
        del spec, resident, wire
        self._mesh = fanout

    async def run(self, step: Step, number: int) -> torch.Tensor:
        await asyncio.sleep(0)
        assert not self._mesh.closed
        if number > LIMIT * self._mesh.steps:
            raise self._mesh.error
        return torch.zeros(sum(rows.samples for rows in step.rows), 1)


class FakeHead:
    def __init__(self, *_: Any) -> None:
        pass

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        del hidden, step
        return [Choice(sequence.num_tokens) for sequence in sequences]


class Scene:
    """A supervisor, and the meshes that it will be given: a mesh, or why there is none."""

    def __init__(self, meshes: list[FakeMesh | Exception], recovery_s: float) -> None:
        self.engine = Engine(Limits(num_pages=100, page_tokens=4), vocabulary=100, context=400)
        self.meshes = meshes
        self.serving: list[bool] = []
        self.exhausted = asyncio.Event()
        self.whole = asyncio.Event()
        self.supervisor = Supervisor(
            engine=self.engine,
            spec=None,  # type: ignore[arg-type]
            resident=None,  # type: ignore[arg-type]
            wire=DTYPE_F32,
            shard_vocabularies=(),
            assemble=self._assemble,  # type: ignore[arg-type]
            on_serving=self._note,
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

    async def _note(self, serving: bool) -> None:
        self.serving.append(serving)
        if serving:
            self.whole.set()


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Forward", FakeForward)
    monkeypatch.setattr(supervisor, "Head", FakeHead)
    monkeypatch.setattr(supervisor, "RETRY_S", 0)


@asynccontextmanager
async def supervised(first: FakeMesh, *others: FakeMesh | Exception, recovery_s: float = 100.0) -> AsyncIterator[Scene]:
    scene = Scene(list(others), recovery_s)
    task = asyncio.create_task(scene.supervisor.run(first))  # type: ignore[arg-type]
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
        assert scene.serving == [True, False, True, False, True]
        assert scene.engine.refusal is None


async def test_requests_end_with_not_serving_when_no_mesh_can_be_had() -> None:
    async with supervised(FakeMesh(1, 2), recovery_s=0.02) as scene:
        completion = scene.engine.submit(Request("r", (1,), 10))
        with pytest.raises(NotServing, match="no full mesh: nobody is there"):
            await collect(completion)
        with pytest.raises(NotServing, match="no full mesh"):
            scene.engine.submit(Request("r", (1,), 10))


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


async def test_step_after_step_that_fails_ends_the_requests_with_the_error() -> None:
    meshes = [FakeMesh(epoch, 0) for epoch in range(1, MAX_FAILURES + 1)]
    async with supervised(*meshes, FakeMesh(9, 1e9)) as scene:
        completion = scene.engine.submit(Request("r", (1,), 10))
        with pytest.raises(WorkerLost, match=f"worker died in epoch {MAX_FAILURES}"):
            await collect(completion)
        # The next one is served: the mesh itself is whole again.
        assert await collect(scene.engine.submit(Request("r", (1,), 3))) == [1, 2, 3]


async def test_failures_with_progress_between_them_are_forgiven() -> None:
    meshes = [FakeMesh(epoch, 1) for epoch in range(1, 4 * MAX_FAILURES)]
    async with supervised(*meshes, FakeMesh(99, 1e9)) as scene:
        assert len(await collect(scene.engine.submit(Request("r", (1,), 30)))) == 30


async def test_defect_ends_the_requests_before_it_is_raised() -> None:
    scene = Scene([], 100.0)
    task = asyncio.create_task(scene.supervisor.run(FakeMesh(1, 1, RuntimeError("a defect"))))  # type: ignore[arg-type]
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
