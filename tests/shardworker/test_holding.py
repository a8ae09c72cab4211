"""Two plans on one worker: the mesh is cut anew while it serves."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
import torch

from protos import plan_pb2, shardworker_pb2
from protos.digest import mesh_digest, shard_digest
from shardworker import loading

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
    talk.call.cancel()
    await until_former(client, [])
    assert (await client.describe()).weights_bytes == before
    fault = (await client.talk().open()).fault
    assert (fault.reason, fault.held.plan_digest) == ("PLAN_MISMATCH", digest_of(other))


async def until_former(client: Any, wanted: list[bytes]) -> None:
    while True:
        found = await client.describe()
        if [former.plan_digest for former in found.held.former] == wanted:
            return


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
