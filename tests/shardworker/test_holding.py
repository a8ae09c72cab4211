"""Two plans on one worker: the mesh is cut anew while it serves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
import torch

from protos import plan_pb2, shardworker_pb2
from protos.digest import mesh_digest, shard_digest
from shardworker import loading
from tests.shardworker.conftest import Rounds, Talk

LOADED = shardworker_pb2.WORKER_STATE_LOADED


@pytest.fixture
def other(tiny: Any) -> plan_pb2.ShardPlan:
    """Another plan of the same model."""
    plan = tiny.plan()
    plan.page_tokens = 8
    return plan


@pytest.fixture
def beside(tiny: Any, other: plan_pb2.ShardPlan) -> shardworker_pb2.LoadRequest:
    request = tiny.load_request([other], assignment=2)
    request.beside = True
    return request


def digest_of(plan: plan_pb2.ShardPlan) -> bytes:
    return mesh_digest([shard_digest(plan)])


async def test_the_former_plan_serves_until_its_last_session_ends(
    client: Any, tiny: Any, beside: Any, other: Any, make_batch: Any
) -> None:
    await client.load()
    before = (await client.describe()).weights_bytes
    talk = client.talk()
    await talk.open()
    await talk.step(1, make_batch((1, 0, 1, [0])))
    loaded = (await client.load(beside))[-1].loaded
    assert (loaded.already_held, loaded.weights_bytes) == (False, before)
    found = await client.describe()
    assert found.held.plan_digest == digest_of(other)
    assert [(former.plan_digest, former.shard) for former in found.held.former] == [(digest_of(tiny.plan()), 0)]
    assert found.weights_bytes == 2 * before
    # It goes on where it was.
    answers = await talk.step(2, make_batch((1, 1, 1, [])))
    assert all(answer.HasField("partial") for answer in answers)
    await open_session(client, other)
    assert (await client.describe()).weights_bytes == 2 * before
    talk.call.cancel()
    await until_former(client, [])
    assert (await client.describe()).weights_bytes == before
    fault = (await client.talk().open()).fault
    assert (fault.reason, fault.held.plan_digest) == ("PLAN_MISMATCH", digest_of(other))


async def open_session(client: Any, plan: plan_pb2.ShardPlan) -> Any:
    """Open one of a coordinator that no other session here is of."""
    talk = Talk(client.stub, Rounds(digest_of(plan), coordinator=b"n" * 16))
    assert (await talk.open()).HasField("opened")
    return talk


async def until_former(client: Any, wanted: list[bytes]) -> None:
    async with asyncio.timeout(20):
        while [former.plan_digest for former in (await client.describe()).held.former] != wanted:
            pass


async def test_a_former_plan_without_sessions_goes_at_once(client: Any, beside: Any, other: Any) -> None:
    await client.load()
    await client.load(beside)
    found = (await client.describe()).held
    assert (found.state, found.plan_digest, list(found.former)) == (LOADED, digest_of(other), [])


async def test_rounds_are_served_while_another_plan_loads(
    client: Any, beside: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    gate, load_weights = threading.Event(), loading.load_weights

    def slow(*arguments: Any, **others: Any) -> Any:
        gate.wait(30)
        return load_weights(*arguments, **others)

    monkeypatch.setattr(loading, "load_weights", slow)
    call = client.stub.Load(beside)
    assert (await call.read()).WhichOneof("event") == "progress"
    answers = await talk.step(1, make_batch((1, 0, 1, [0])))
    assert all(answer.HasField("partial") for answer in answers)
    # It is what it was, as long as it is nothing else.
    assert (await client.describe()).held.state == LOADED
    gate.set()
    while (answer := await call.read()).WhichOneof("event") == "progress":
        pass
    assert answer.loaded.held.plan_digest == mesh_digest(beside.shard_digests)


async def test_a_load_beside_that_fails_leaves_what_was_there(client: Any, tiny: Any, beside: Any, make_batch: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    first = digest_of(tiny.plan())
    (tiny.directory / "1.safetensors").unlink()
    with pytest.raises(grpc.aio.AioRpcError, match=r"1\.safetensors"):
        await client.load(beside)
    held = (await client.describe()).held
    assert (held.state, held.plan_digest, held.assignment) == (LOADED, first, 2)
    answers = await talk.step(1, make_batch((1, 0, 1, [0])))
    assert all(answer.HasField("partial") for answer in answers)


async def test_a_plan_that_nobody_uses_goes_before_another_is_read(
    client: Any, tiny: Any, beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await client.load(beside)
    third = tiny.plan()
    third.page_tokens = 16
    request = tiny.load_request([third], assignment=3)
    request.beside = True
    held: list[int] = []
    load_weights, shards = loading.load_weights, client.holding._shards

    def note(*arguments: Any, **others: Any) -> Any:
        held.append(len(shards))
        return load_weights(*arguments, **others)

    monkeypatch.setattr(loading, "load_weights", note)
    await client.load(request)
    assert held == [1]


async def test_a_load_that_is_given_up_in_its_last_moment_is_not_held(
    client: Any, tiny: Any, beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.load()
    entered, gate, load_weights = threading.Event(), threading.Event(), loading.load_weights
    done: list[bool] = []

    def late(*arguments: Any, **others: Any) -> Any:
        weights = load_weights(*arguments, **others)
        entered.set()
        gate.wait(30)
        done.append(True)
        return weights

    talk = client.talk()
    await talk.open()
    monkeypatch.setattr(loading, "load_weights", late)
    call = client.stub.Load(beside)
    assert (await call.read()).WhichOneof("event") == "progress"
    assert await asyncio.to_thread(entered.wait, 30)
    call.cancel()
    while (loads := client.holding._loading) and not loads.cancelled.is_set():
        await client.describe()
    gate.set()
    while client.holding._loading:
        await client.describe()
    assert done == [True]
    held = (await client.describe()).held
    assert (held.plan_digest, list(held.former)) == (digest_of(tiny.plan()), [])


async def test_asking_again_for_the_former_plan_makes_it_the_latest(client: Any, tiny: Any, beside: Any, other: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await client.load(beside)
    answer = (await client.load(tiny.load_request(assignment=2)))[-1].loaded
    assert answer.already_held
    # Nobody serves from the other one.
    assert answer.held.plan_digest == digest_of(tiny.plan())
    await until_former(client, [])
    assert (await talk.attend(1, 0, torch.ones(1, 64))).fault.reason != "PLAN_MISMATCH"
    assert (await client.describe()).held.plan_digest != digest_of(other)


async def test_a_plan_that_does_not_stand_beside_replaces_all(client: Any, tiny: Any, beside: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await client.load(beside)
    third = tiny.plan()
    third.page_tokens = 16
    await client.load(tiny.load_request([third], assignment=3))
    held = (await client.describe()).held
    assert (held.plan_digest, list(held.former)) == (digest_of(third), [])
    assert (await talk.attend(1, 0, torch.ones(1, 64))).fault.reason == "PLAN_MISMATCH"


async def test_release_drops_former_plans_too(client: Any, beside: Any) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await client.load(beside)
    answer = await client.stub.Release(shardworker_pb2.ReleaseRequest(assignment=2))
    assert answer.held == shardworker_pb2.Held(state=shardworker_pb2.WORKER_STATE_EMPTY, assignment=2)
    assert (await client.describe()).weights_bytes == 0


async def test_a_plan_is_kept_until_the_one_that_takes_its_place_is_served_from(
    client: Any, tiny: Any, beside: Any, other: Any, make_batch: Any
) -> None:
    await client.load()
    talk = client.talk()
    await talk.open()
    await client.load(beside)
    # Its mesh breaks before the next one is there, and comes back.
    talk.call.cancel()
    async with asyncio.timeout(20):
        while (await client.describe()).num_sessions:
            pass
    again = client.talk(epoch=2)
    assert (await again.open()).HasField("opened")
    answers = await again.step(1, make_batch((1, 0, 1, [0])))
    assert all(answer.HasField("partial") for answer in answers)
    await open_session(client, other)
    again.call.cancel()
    await until_former(client, [])
    held = (await client.describe()).held
    assert held.plan_digest == digest_of(other) != digest_of(tiny.plan())
