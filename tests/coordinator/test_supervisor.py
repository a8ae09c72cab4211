"""Meshes that break, and what becomes of the requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from coordinator import resharding
from coordinator.completion import Completion
from coordinator.engine import Engine
from coordinator.mesh import Blueprint
from coordinator.proof import Prover
from coordinator.request import Request
from coordinator.resharding import Resharding
from coordinator.sampler import Choice
from coordinator.scheduler import SUSPECT_AFTER, Limits, Step
from coordinator.sequence import Sequence
from coordinator.supervisor import Supervisor
from protos import rpc
from protos.errors import MeshError, NotServing, OutOfMemory, WorkerLost, WrongResult

CANARY = "canary"
OFTEN = 6


class FakePlan:
    """Of so many shards."""

    def __init__(self, num_shards: int) -> None:
        self.shards = (None,) * num_shards
        self.digest = bytes([num_shards]) * 32


class FakeMesh:
    """A mesh of two workers that lasts for so many steps of callers, in which `poison` is the first token of no request.

    It is its own fan-out, forward and head.
    """

    def __init__(self, epoch: int, steps: float, error: Exception | None = None, *, canary: int = 1, poison: int = -1) -> None:
        self.fanout = self.forward = self.head = self
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

    async def run(self, step: Step, number: int) -> torch.Tensor:
        del number
        await asyncio.sleep(0)
        assert not self.closed
        if step.rows[0].sequence.request.request_id == CANARY:
            if not self.canary:
                raise WorkerLost(f"the canary died in epoch {self.epoch}", shards=(0,))
        else:
            self.rows.append([rows.sequence.request.prompt[0] for rows in step.rows])
            self.steps -= 1
            if self.steps < 0 or self.poison in self.rows[-1]:
                raise self.error
        return torch.full((sum(rows.samples for rows in step.rows), 1), self.canary)

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        del step
        if sequences[0].request.request_id == CANARY:
            return [Choice(1, -0.5, ((int(hidden[0]), -0.5), (0, -0.9)))]
        return [Choice(sequence.num_tokens) for sequence in sequences]


class FakeBuilder:
    """Gives the meshes of a list: a mesh, or why there is none; with room beside a mesh that serves, or without."""

    def __init__(self, meshes: list[FakeMesh | Exception]) -> None:
        self.meshes = meshes
        self.built: list[tuple[int, tuple[str, ...]]] = []
        self.blamed: list[str] = []
        self.exhausted, self.tried_often = asyncio.Event(), asyncio.Event()
        self.drawn, self.swept = asyncio.Event(), asyncio.Event()
        self.may_draw, self.may_build = asyncio.Event(), asyncio.Event()
        self.may_draw.set()
        self.may_build.set()
        self.has_room = True
        self.num_pages = 100
        self.waited: list[bool] = []
        self.drawn_again = asyncio.Event()
        self.tidied: list[tuple[int, tuple[str, ...]]] = []

    async def plan(self, num_shards: int) -> FakePlan:
        return FakePlan(num_shards)

    async def draw(self, plan: FakePlan, least_tokens: int = 0, *, waits: bool = True) -> Blueprint:
        self.waited.append(waits)
        self.drawn.set()
        await self.may_draw.wait()
        if len(self.waited) == 2:
            self.drawn_again.set()
        limits = Limits(num_pages=max(self.num_pages, -(-least_tokens // 4)), page_tokens=4)
        return Blueprint(plan, limits)  # type: ignore[arg-type]

    async def build(self, blueprint: Blueprint, beside: tuple[str, ...] = ()) -> FakeMesh:
        await asyncio.sleep(0)
        await self.may_build.wait()
        self.built.append((len(blueprint.plan.shards), beside))
        if len(self.built) == OFTEN:
            self.tried_often.set()
        if beside and not self.has_room:
            raise OutOfMemory("no room for both")
        if not self.meshes:
            self.exhausted.set()
            raise WorkerLost("nobody is there")
        mesh = self.meshes.pop(0)
        if isinstance(mesh, Exception):
            raise mesh
        mesh.blueprint = blueprint
        return mesh

    async def tidy(self, plan: FakePlan, addresses: tuple[str, ...]) -> None:
        self.tidied.append((len(plan.shards), addresses))
        if len(self.tidied) == resharding.SWEEPS:
            self.swept.set()

    async def wait_changed(self, timeout_s: float) -> None:
        del timeout_s
        await asyncio.sleep(0)

    def blame(self, error: MeshError, addresses: Iterable[str]) -> None:
        del error
        self.blamed.extend(addresses)


class Scene:
    """A supervisor, and the meshes that it will be given."""

    def __init__(self, meshes: list[FakeMesh | Exception], recovery_s: float) -> None:
        self.engine = Engine(Limits(num_pages=100, page_tokens=4), vocabulary=100, context=400)
        self.builder = FakeBuilder(meshes)
        self.meshes = meshes
        self.serving: list[str] = []
        self.whole = asyncio.Event()
        builder: Any = self.builder
        plan: Any = FakePlan(2)
        prover = Prover(self.engine, builder)
        self.resharding = Resharding(self.engine, builder, prover, None, present=plan, wanted=plan)
        self.supervisor = Supervisor(
            engine=self.engine,
            builder=builder,
            prover=prover,
            resharding=self.resharding,
            on_serving=self._note,  # type: ignore[arg-type]
            recovery_s=recovery_s,
        )

    async def _note(self, mesh: FakeMesh | None) -> None:
        self.serving.append(mesh.addresses[0] if mesh else "")
        if mesh:
            self.whole.set()


@asynccontextmanager
async def supervised(*meshes: FakeMesh | Exception, recovery_s: float = 100.0) -> AsyncIterator[Scene]:
    scene = Scene(list(meshes), recovery_s)
    first = await scene.supervisor.start()
    scene.builder.drawn.clear()
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
        assert scene.builder.blamed == ["b1", "b2"]
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
        assert scene.builder.blamed == ["a1"]
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
        assert scene.builder.blamed == ["b1", "newcomer"]
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
        scene.builder.may_build.clear()
        with pytest.raises(NotServing, match="no full mesh: worker died in epoch 1"):
            await collect(scene.engine.submit(Request("r", (1,), 10)))
        scene.whole.clear()
        scene.meshes.append(FakeMesh(2, 1e9))
        scene.builder.may_build.set()
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert await collect(scene.engine.submit(Request("r", (1,), 3))) == [1, 2, 3]


async def test_mesh_that_comes_back_after_giving_up_serves_again() -> None:
    async with supervised(FakeMesh(1, 2), recovery_s=0.0) as scene:
        completion = scene.engine.submit(Request("r", (1,), 10))
        # Without recovery the requests end at once, with what broke the mesh.
        with pytest.raises(NotServing, match="no full mesh: worker died in epoch 1"):
            await collect(completion)
        await asyncio.wait_for(scene.builder.exhausted.wait(), 5)
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


async def test_a_mesh_is_cut_anew_beside_the_one_that_serves() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, second) as scene:
        scene.builder.num_pages = 50
        completion = scene.engine.submit(Request("r", (1,), 200))
        tokens = completion.tokens()
        assert [(await anext(tokens)).token for _ in range(3)] == [1, 2, 3]
        await scene.resharding.ask(4)
        assert [choice.token async for choice in tokens] == list(range(4, 201))
        assert 0 < len(first.rows) < 200
        assert first.closed
        # Never without a mesh, and with room for the request that was there.
        assert scene.serving == ["a1", "a2"]
        assert scene.engine.scheduler.limits.kv_tokens >= 201
        assert scene.builder.built == [(2, ()), (4, ("a1", "b1"))]
        recoveries = scene.supervisor.recoveries
        assert (recoveries.count, recoveries.failures, recoveries.reshards) == (0, {}, 1)
        assert recoveries.latest is not None
        assert (recoveries.latest.failure, recoveries.latest.assemble_ns) == ("", 0)
        # The step that was under way is lost too.
        assert recoveries.latest.detect_ns > 0
        assert recoveries.latest.replay_ns > 0
        assert len(scene.resharding.present.shards) == 4
        assert scene.resharding.obstacle == ""


async def test_where_there_is_no_room_for_both_the_mesh_gives_way_once() -> None:
    first, again, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9), FakeMesh(3, 1e9)
    async with supervised(first, WorkerLost("not there yet"), again) as scene:
        scene.builder.has_room = False
        completion = scene.engine.submit(Request("r", (1,), 300))
        await asyncio.wait_for(scene.whole.wait(), 5)
        await scene.resharding.ask(4)
        # It is tried, and then the mesh that was there comes back, for as long as there is no room.
        await asyncio.wait_for(scene.builder.tried_often.wait(), 5)
        beside = (4, ("a2", "b2"))
        assert scene.builder.built[:OFTEN] == [(2, ()), (4, ("a1", "b1")), (4, ()), (2, ()), beside, beside]
        assert "no room for both" in scene.resharding.obstacle
        scene.builder.has_room = True
        scene.meshes.append(second)
        assert await collect(completion) == list(range(1, 301))
        assert scene.serving == ["a1", "", "a2", "a3"]
        assert (scene.supervisor.recoveries.count, scene.supervisor.recoveries.reshards) == (0, 1)


async def test_requests_wait_for_a_mesh_that_gave_way_as_long_as_nothing_fails() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, recovery_s=0.02) as scene:
        scene.builder.has_room = False
        completion = scene.engine.submit(Request("r", (1,), 100))
        tokens = completion.tokens()
        assert (await anext(tokens)).token == 1
        await scene.resharding.ask(4)
        while "" not in scene.serving:
            await scene.builder.wait_changed(0)
        scene.builder.may_build.clear()
        # Longer than for a mesh that broke.
        await asyncio.sleep(0.1)
        scene.meshes.append(second)
        scene.builder.may_build.set()
        assert [choice.token async for choice in tokens] == list(range(2, 101))


async def test_requests_do_not_wait_for_ever_once_something_failed_after_the_mesh_gave_way() -> None:
    async with supervised(FakeMesh(1, 1e9), recovery_s=0.02) as scene:
        scene.builder.has_room = False
        completion = scene.engine.submit(Request("r", (1,), 300))
        await asyncio.wait_for(scene.whole.wait(), 5)
        await scene.resharding.ask(4)
        with pytest.raises(NotServing, match="no full mesh: nobody is there"):
            await collect(completion)


async def test_a_mesh_that_breaks_while_another_is_wanted_is_made_once_more_at_first() -> None:
    first, again, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9), FakeMesh(3, 1e9)
    async with supervised(first, again, second) as scene:
        completion = scene.engine.submit(Request("r", (1,), 50))
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.resharding.want(FakePlan(4))  # type: ignore[arg-type]
        first.broken.set()
        assert await collect(completion) == list(range(1, 51))
        # Workers that hold most of it are the sooner there.
        assert scene.builder.built == [(2, ()), (2, ()), (4, ("a2", "b2"))]
        assert scene.serving == ["a1", "", "a2", "a3"]
        assert (scene.supervisor.recoveries.count, scene.supervisor.recoveries.reshards) == (1, 1)


async def test_a_mesh_that_cannot_be_had_any_more_is_made_as_is_wanted() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, WorkerLost("too few"), second) as scene:
        completion = scene.engine.submit(Request("r", (1,), 50))
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.resharding.want(FakePlan(1))  # type: ignore[arg-type]
        first.broken.set()
        assert await collect(completion) == list(range(1, 51))
        assert scene.builder.built == [(2, ()), (2, ()), (1, ())]
        # Workers that are away are waited for at the start only.
        assert scene.builder.waited == [True, False]
        assert scene.serving == ["a1", "", "a2"]
        assert (scene.supervisor.recoveries.count, scene.supervisor.recoveries.reshards) == (1, 1)


async def test_requests_that_come_while_a_smaller_mesh_is_made_must_fit_there_too() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, second) as scene:
        scene.builder.num_pages = 25
        present = scene.engine.submit(Request("r", (1,), 120))
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.whole.clear()
        scene.builder.may_build.clear()
        assert scene.engine.max_tokens == 400
        await scene.resharding.ask(4)
        await scene.builder.drawn.wait()
        await asyncio.sleep(0)
        # Of 30 pages, for there is one that needs them.
        assert scene.engine.max_tokens == 124
        with pytest.raises(OutOfMemory, match="need up to 251 tokens of KV cache, the mesh has 124"):
            scene.engine.submit(Request("r", (1,), 250))
        scene.builder.may_build.set()
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert await collect(present) == list(range(1, 121))
        assert scene.engine.scheduler.limits.kv_tokens == scene.engine.max_tokens == 124


async def test_a_request_that_comes_between_is_counted_when_the_next_mesh_is_sized() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, second) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.whole.clear()
        scene.builder.num_pages = 5
        scene.builder.may_draw.clear()
        await scene.resharding.ask(4)
        await scene.builder.drawn.wait()
        completion = scene.engine.submit(Request("r", (1,), 200))
        scene.builder.may_draw.set()
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert await collect(completion) == list(range(1, 201))
        assert scene.engine.max_tokens == 204


async def test_what_is_not_wanted_any_more_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "SWEEP_S", 0.0)
    first = FakeMesh(1, 1e9)
    async with supervised(first) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.builder.num_pages = 5
        scene.builder.may_build.clear()
        await scene.resharding.ask(4)
        await scene.builder.drawn.wait()
        await asyncio.sleep(0)
        assert scene.engine.max_tokens == 20
        await scene.resharding.ask(2)
        # What was loaded of it has to go.
        await asyncio.wait_for(scene.builder.swept.wait(), 5)
        assert scene.builder.tidied == [(2, ("a1", "b1"))] * resharding.SWEEPS
        assert scene.engine.max_tokens == 400
        late = FakeMesh(2, 1e9)
        scene.meshes.append(late)
        scene.builder.may_build.set()
        assert await collect(scene.engine.submit(Request("r", (1,), 50))) == list(range(1, 51))
        assert scene.serving == ["a1"]
        assert scene.meshes == [late]
        # What could not be is forgotten with it.
        scene.resharding.obstacle = "99 shards"
        await scene.resharding.ask(2)
        assert scene.resharding.obstacle == ""


async def test_a_number_that_is_asked_for_once_more_while_its_mesh_is_made_is_that_mesh() -> None:
    first, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9)
    async with supervised(first, WorkerLost("too few"), second) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        scene.whole.clear()
        scene.resharding.want(FakePlan(4))  # type: ignore[arg-type]
        scene.builder.drawn.clear()
        first.broken.set()
        # It is made by the recovery, which nobody's wishes disturb.
        await scene.builder.drawn.wait()
        for num_shards in (2, 4):
            await scene.resharding.ask(num_shards)
        await asyncio.wait_for(scene.whole.wait(), 5)
        assert await collect(scene.engine.submit(Request("r", (1,), 50))) == list(range(1, 51))
        assert scene.resharding.wanted is scene.resharding.present
        assert scene.serving == ["a1", "", "a2"]


async def test_a_next_mesh_with_another_canary_does_not_take_over() -> None:
    first, liar, second = FakeMesh(1, 1e9), FakeMesh(2, 1e9, canary=7), FakeMesh(3, 1e9)
    async with supervised(first, liar, second) as scene:
        await asyncio.wait_for(scene.whole.wait(), 5)
        await scene.resharding.ask(4)
        assert await collect(scene.engine.submit(Request("r", (1,), 300))) == list(range(1, 301))
        assert scene.serving == ["a1", "a3"]
        assert liar.closed
        assert not liar.rows
