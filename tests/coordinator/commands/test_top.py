"""What `coordctl top` makes of two looks at a mesh."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.commands import top as command
from coordinator.commands.top import Look, view
from protos.errors import InvalidArgument
from protos.generation_pb2 import ExpertHeat, GetMeshResponse, MeshLoad, MeshRecovery, MeshWorker, MeshWorkerRounds
from tests.coordinator.commands.fake_client import FakeConnection

S = 10**9


def mesh_of(seconds: int) -> GetMeshResponse:
    """A mesh so many seconds after its start, that makes 7 tokens each."""
    rounds = MeshWorkerRounds(
        compute_ns=seconds * S // 2, queue_ns=seconds * S // 10, wire_ns=seconds * S // 4, wait_ns=seconds * S // 20
    )
    return GetMeshResponse(
        serving=True,
        epoch=3,
        num_shards=1,
        wanted_shards=2,
        reshard_obstacle="1 of 2 [workers] answers",
        workers=[
            MeshWorker(address="[a]:1", reachable=True, serving=True, rounds=rounds, kv_bytes=3 * 2**20),
            MeshWorker(address="b:1", reachable=True),
            MeshWorker(address="c:1", error="gone"),
        ],
        load=MeshLoad(running=2, waiting=1, used_pages=3, total_pages=4, steps=5 * seconds, completion_tokens=7 * seconds),
        recovery=MeshRecovery(
            failures={"WORKER_LOST": 2},
            recoveries=2,
            reshards=1,
            last_failure="c:1 [died]",
            last_detect_ns=S,
            last_replay_ns=S // 2,
        ),
        proven_ago_ns=S // 10,
        hottest_experts=[ExpertHeat(layer=3, expert=17, share=0.25, over_mean=4.0)],
    )


class FakeClient(FakeConnection):
    looks = 0

    async def mesh(self) -> GetMeshResponse:
        FakeClient.looks += 1
        return mesh_of(FakeClient.looks)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(command, "GenerationClient", FakeClient)
    return CliRunner().invoke(command.top, ["--coordinator", "unix:/socket", "--interval", "0.2", *arguments])


def test_rates_are_of_the_time_between_two_looks() -> None:
    found = view(Look(mesh_of(10), 100.0), Look(mesh_of(14), 104.0))
    assert (found.tokens_per_s, found.steps_per_s) == (7, 5)
    assert (found.kv_usage, found.last_stall_s) == (0.75, 1.5)
    assert found.workers[0].shares == pytest.approx({"compute": 0.5, "queue": 0.1, "wire": 0.25, "wait": 0.05})
    assert [worker.role for worker in found.workers] == ["shard 0", "spare", "unreachable"]
    assert found.experts == [{"layer": 3, "expert": 17, "share": 0.25, "over_mean": 4}]


def test_a_coordinator_that_was_started_anew_gives_no_negative_rates() -> None:
    found = view(Look(mesh_of(1000), 100.0), Look(mesh_of(1), 101.0))
    assert (found.tokens_per_s, found.steps_per_s) == (0, 0)
    assert set(found.workers[0].shares.values()) == {0}


def test_a_worker_that_is_new_has_its_time_since_the_start() -> None:
    earlier = GetMeshResponse(load=MeshLoad(steps=1))
    assert view(Look(earlier, 0.0), Look(mesh_of(1), 1.0)).workers[0].shares["compute"] == pytest.approx(0.5)


def test_json_is_one_object_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "--once", "--json")
    found = json.loads(result.stdout)
    assert found["tokens_per_s"] > 0
    assert found["failures"] == {"WORKER_LOST": 2}
    assert (found["num_shards"], found["wanted_shards"], found["reshards"]) == (1, 2, 1)
    assert found["workers"][0]["address"] == "[a]:1"


def test_people_see_workers_experts_and_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, "--once").stdout
    for text in (
        "[a]:1",
        "unreachable",
        "3 MiB",
        "17 of layer 3",
        "25.0%",
        "2 recoveries; failures: 2 WORKER_LOST; 1 reshards",
        "2 shards wanted: 1 of 2 [workers] answers",
        "c:1 [died]",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "text"), [(("--json",), "say --once too"), ((), "needs a terminal that can move its cursor: say --once")]
)
def test_what_cannot_renew_itself_is_refused(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str) -> None:
    error = run(monkeypatch, *arguments).exception
    assert isinstance(error, InvalidArgument)
    assert text in str(error)
