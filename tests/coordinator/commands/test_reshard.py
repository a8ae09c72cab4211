"""What `coordctl reshard` asks for, follows and tells."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from coordinator.commands import reshard as command
from protos.errors import Forbidden, MeshError, Unauthenticated, WorkerLost
from protos.generation_pb2 import GetMeshResponse, MeshLoad, MeshRecovery, MeshWorker
from tests.coordinator.commands.fake_client import FakeConnection

MS = 10**6


def mesh_of(num_shards: int, wanted: int, obstacle: str = "", *, serving: bool = True, **recovery: int) -> GetMeshResponse:
    return GetMeshResponse(
        serving=serving,
        num_shards=num_shards,
        wanted_shards=wanted,
        reshard_obstacle=obstacle,
        workers=[
            # Not in the order of the shards.
            MeshWorker(address=f"w{number}:1", reachable=True, serving=number < num_shards, shard=max(0, num_shards - 1 - number))
            for number in range(5)
        ],
        recovery=MeshRecovery(**recovery),
    )


RESHARDED = mesh_of(4, 4, reshards=1, last_canary_ns=12 * MS, last_replay_ns=29 * MS)


class FakeClient(FakeConnection):
    """Answers each look with the next of `meshes`, the last one again and again."""

    meshes: ClassVar[list[GetMeshResponse | MeshError | Callable[[], None]]] = []
    asked: ClassVar[list[int]] = []
    refusal: ClassVar[MeshError | None] = None

    async def mesh(self) -> GetMeshResponse:
        found = self.meshes.pop(0) if len(self.meshes) > 1 else self.meshes[0]
        if isinstance(found, MeshError):
            raise found
        if isinstance(found, GetMeshResponse):
            return found
        found()
        await asyncio.Event().wait()
        raise AssertionError

    async def reshard(self, num_shards: int) -> None:
        if self.refusal:
            raise self.refusal
        self.asked.append(num_shards)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(command, "GenerationClient", FakeClient)
    monkeypatch.setattr(command, "LOOK_S", 0.0)
    monkeypatch.setattr(FakeClient, "asked", [])

    def invoke(
        meshes: list[GetMeshResponse | MeshError | Callable[[], None]], *arguments: str, refusal: MeshError | None = None
    ) -> Any:
        monkeypatch.setattr(FakeClient, "meshes", meshes)
        monkeypatch.setattr(FakeClient, "refusal", refusal)
        return CliRunner().invoke(command.reshard, ["--coordinator", "unix:/socket", "--shards", "4", *arguments])

    return invoke


def test_it_follows_until_the_mesh_serves_and_tells_what_is_in_the_way_when_that_changes(run: Callable[..., Any]) -> None:
    result = run(
        [
            mesh_of(2, 2),
            mesh_of(2, 2),  # not taken over yet
            mesh_of(2, 4),
            mesh_of(2, 4, "3 of 4 workers answer"),
            mesh_of(2, 4, "3 of 4 workers answer"),
            mesh_of(2, 4, serving=False),
            mesh_of(4, 4, serving=False),
            RESHARDED,
        ]
    )
    assert result.exit_code == 0, result.output
    assert FakeClient.asked == [4]
    assert result.stderr.splitlines() == [
        "served by 2 shards, 4 wanted: under way",
        "served by 2 shards, 4 wanted: 3 of 4 workers answer",
        "no full mesh serves, 4 wanted: under way",
    ]
    (line,) = result.stdout.splitlines()
    assert line.startswith("served by 4 shards after 0.")
    assert "callers' streams paused 0.041 s (noticed in 0 ms, assembled in 0 ms, proven in 12 ms, replayed in 29 ms)" in line
    assert line.endswith("workers: w3:1, w2:1, w1:1, w0:1")


def test_json_is_one_object_and_nothing_else(run: Callable[..., Any]) -> None:
    result = run([mesh_of(2, 2), mesh_of(2, 4, "no worker"), RESHARDED], "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["num_shards_before"], found["num_shards"]) == (2, 4)
    assert found["paused_s"] == {"detect": 0, "assemble": 0, "canary": 0.012, "replay": 0.029}
    assert found["workers"][0] == {"shard": 0, "address": "w3:1"}


def test_as_many_as_there_are_is_said_at_once(run: Callable[..., Any]) -> None:
    result = run([mesh_of(4, 4, reshards=3)])
    assert (result.exit_code, result.stdout) == (0, "served already by 4 shards: w3:1, w2:1, w1:1, w0:1\n")
    # A mesh that is about to become another one is not served already: it shall stay.
    result = run([mesh_of(4, 2), mesh_of(4, 4)])
    assert result.stdout.startswith("served by 4 shards after 0.")
    assert "paused" not in result.stdout
    assert FakeClient.asked == [4, 4]


def test_a_pause_is_told_when_it_is_over(run: Callable[..., Any]) -> None:
    paused = mesh_of(4, 4, reshards=1, last_canary_ns=12 * MS)
    paused.load.CopyFrom(MeshLoad(running=2))
    assert "paused 0.041 s" in run([mesh_of(2, 2), paused, paused, RESHARDED]).stdout


def test_a_pause_that_nobody_had_is_not_waited_for(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SETTLE_S", 0.01)
    busy = mesh_of(4, 4, reshards=1, last_canary_ns=12 * MS)
    busy.load.CopyFrom(MeshLoad(running=1))
    assert "paused 0.012 s" in run([mesh_of(2, 2), busy]).stdout


def test_a_coordinator_that_is_away_for_a_while_is_waited_for(run: Callable[..., Any]) -> None:
    away = WorkerLost("coordinator unix:/socket: connection refused")
    result = run([mesh_of(2, 2), away, away, mesh_of(2, 4), RESHARDED])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [str(away), "served by 2 shards, 4 wanted: under way"]


@pytest.mark.parametrize("json_", [(), ("--json",)])
def test_time_that_is_up_is_one_error_that_says_how_far_it_is(run: Callable[..., Any], json_: tuple[str, ...]) -> None:
    error = run([mesh_of(2, 2), mesh_of(2, 4, "3 of 4 workers answer")], "--timeout", "0.05", *json_).exception
    assert type(error) is MeshError
    assert str(error) == (
        "after 0.05 s served by 2 shards, 4 wanted: 3 of 4 workers answer; the mesh goes on, coordctl status shows how far"
    )


def test_a_coordinator_that_says_nothing_any_more_is_not_followed_for_ever(run: Callable[..., Any]) -> None:
    error = run([mesh_of(2, 2), lambda: None], "--timeout", "0.05").exception
    assert str(error).startswith("after 0.05 s it was asked for, and no more is known; ")


def test_somebody_who_asks_for_another_number_ends_it(run: Callable[..., Any]) -> None:
    error = run([mesh_of(2, 2), mesh_of(2, 4), mesh_of(2, 3)]).exception
    assert type(error) is MeshError
    assert str(error).startswith("3 shards are wanted by now, no longer 4: ")


@pytest.mark.parametrize("refusal", [Forbidden("not yours"), Unauthenticated("no API key")])
def test_a_refusal_is_the_end(run: Callable[..., Any], refusal: MeshError) -> None:
    assert run([mesh_of(2, 2)], refusal=refusal).exception is refusal
    assert run([mesh_of(2, 2), refusal]).exception is refusal


def test_ctrl_c_ends_the_following_and_says_that_the_mesh_goes_on(run: Callable[..., Any]) -> None:
    result = run([mesh_of(2, 2), lambda: os.kill(os.getpid(), signal.SIGINT)])
    assert result.exit_code == 130
    assert FakeClient.asked == [4]
    assert result.stderr == "no longer followed; the mesh goes on, coordctl status shows how far\n"


@pytest.mark.parametrize("arguments", [("--shards", "0"), ("--shards", "-1"), ("--shards", "x"), ("--timeout", "nan")])
def test_what_is_no_number_of_shards_or_seconds_is_refused_before_anybody_is_asked(
    run: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    assert run([mesh_of(2, 2)], *arguments).exit_code == 2
    assert FakeClient.asked == []
