"""What `coordctl status` shows of a mesh."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from coordinator.commands import status as command
from protos.generation_pb2 import GetMeshResponse, GetModelResponse, MeshLoad, MeshRecovery, MeshWorker
from tests.coordinator.commands.fake_client import FakeConnection

if TYPE_CHECKING:
    pass

LONG = "unix:/" + "x" * 101
ERROR = "worker b:1 [connection] refused: " + "y" * 300
MESH = GetMeshResponse(
    serving=True,
    plan_digest=bytes(range(32)),
    epoch=6,
    num_shards=2,
    wanted_shards=2,
    workers=[
        MeshWorker(
            address=LONG, reachable=True, serving=True, shard=1, version="1.2.3", device="cpu", num_threads=3, kv_bytes=3 * 2**29
        ),
        MeshWorker(address="b:1", error=ERROR),
        MeshWorker(address="c:1", reachable=True, version="1.2.4", device="cuda", memory_free_bytes=139 * 2**30),
    ],
    load=MeshLoad(running=1, waiting=2, used_pages=3, total_pages=9, page_tokens=4, completion_tokens=7, steps=8, preemptions=5),
)


class FakeClient(FakeConnection):
    async def model(self) -> GetModelResponse:
        return GetModelResponse(model="/models/[tiny]", family="llama")

    async def mesh(self) -> GetMeshResponse:
        return MESH


def printed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(command, "GenerationClient", FakeClient)
    monkeypatch.setenv("COLUMNS", "40")
    result = CliRunner().invoke(command.status, ["--coordinator", "unix:/socket", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_every_worker_and_the_load_are_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch).splitlines()
    assert lines[0] == "/models/[tiny] (llama) on 2 shards: serving, epoch 6, plan 000102030405"
    assert lines[2].split() == [LONG, *(["shard", "1", "1.2.3", "cpu", "3", "0", "B", "1.50", "GiB", "0", "B", "0", "B"])]
    assert lines[3].split() == ["b:1", "unreachable"]
    assert lines[4].split() == ["c:1", "spare", "1.2.4", "cuda", "0", "0", "B", "0", "B", "139", "GiB", "0", "B"]
    assert lines[5] == f"b:1 is unreachable: {ERROR}"
    assert lines[6] == "1 running, 2 waiting, KV 12 of 36 tokens, 7 tokens generated in 8 steps, 5 preemptions"
    assert len(lines) == 7


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = json.loads(printed(monkeypatch, "--json"))
    assert found["plan_digest"] == bytes(range(32)).hex()
    assert [worker["error"] for worker in found["workers"]] == ["", ERROR, ""]
    assert found["load"]["preemptions"] == 5


@pytest.mark.parametrize(("obstacle", "told"), [("3 of 4 [workers] answer", "3 of 4 [workers] answer"), ("", "under way")])
def test_a_mesh_that_is_cut_anew_says_so_and_what_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, obstacle: str, told: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MESH", GetMeshResponse(num_shards=2, wanted_shards=4, reshard_obstacle=obstacle))
    assert f"4 shards wanted: {told}" in printed(monkeypatch).splitlines()
    found = json.loads(printed(monkeypatch, "--json"))
    assert (found["wanted_shards"], found["reshard_obstacle"]) == (4, obstacle)


def test_reshards_and_what_they_cost_are_shown_without_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = MeshRecovery(reshards=2, last_canary_ns=12 * 10**6)
    monkeypatch.setattr(sys.modules[__name__], "MESH", GetMeshResponse(recovery=recovery))
    line = printed(monkeypatch).splitlines()[-1]
    assert line.startswith("failures: 0; recoveries: 0; reshards: 2; the latest noticed in 0 ms, ")
    assert "proven in 12 ms" in line
    assert json.loads(printed(monkeypatch, "--json"))["recovery"]["reshards"] == 2
