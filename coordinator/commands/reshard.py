"""`coordctl reshard`: another number of shards for a mesh that serves, followed until it serves with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import click

from coordinator.client import GenerationClient
from coordinator.commands.console import show_parts, show_shards
from coordinator.commands.options import Seconds, caller_credentials, caller_options, json_option
from coordinator.commands.running import run
from protos import rpc
from protos.errors import MeshError, NotServing, WorkerLost

if TYPE_CHECKING:
    from coordinator.client import Credentials
    from protos.generation_pb2 import GetMeshResponse

LOOK_S = 0.5
"""Between two looks at the mesh, seconds."""

SETTLE_S = 10.0
"""Longest that the requests which were interrupted are waited for, to tell how long they paused, seconds."""

_MAX_SHARDS = 2**32 - 1
_DAY_S = 86400.0


@click.command()
@click.option("--coordinator", required=True, metavar="HOST:PORT", help="The coordinator to ask.")
@click.option("--shards", "num_shards", required=True, type=click.IntRange(1, _MAX_SHARDS), help="How many there shall be.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(0.0, _DAY_S),
    default=600.0,
    show_default=True,
    help="Seconds until this command gives up following; the mesh does not give up.",
)
@caller_options
@json_option
def reshard(coordinator: str, num_shards: int, timeout_s: float, **flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Cut the mesh into another number of shards while it serves, and follow that until it is done."""
    address = rpc.check_address(coordinator, insecure=flags["insecure"], tls=flags["tls"] is not None)
    run(_reshard(address, caller_credentials(flags), num_shards, timeout_s, as_json=flags["as_json"]))


async def _reshard(address: str, credentials: Credentials, num_shards: int, timeout_s: float, *, as_json: bool) -> None:
    async with GenerationClient(address, credentials) as client:
        before = await client.mesh()
        began_s = time.monotonic()
        await client.reshard(num_shards)
        already = serves(before, num_shards)
        follower = Follower(client, num_shards, quiet=as_json)
        mesh = before if already else await follower.wait(timeout_s)
        seconds = time.monotonic() - began_s
        if mesh.recovery.reshards > before.recovery.reshards:
            mesh = await follower.settle(mesh)
    if as_json:
        click.echo(json.dumps(_as_dict(before, mesh, seconds)))
    elif already:
        click.echo(f"served already by {show_shards(num_shards)}: {_workers(mesh)}")
    else:
        click.echo(f"served by {show_shards(num_shards)} after {seconds:.2f} s; {_pause(before, mesh)}workers: {_workers(mesh)}")


def serves(mesh: GetMeshResponse, num_shards: int) -> bool:
    """Whether a full mesh of so many shards serves, and no other number is wanted."""
    return mesh.serving and mesh.num_shards == mesh.wanted_shards == num_shards


class Follower:
    """Looks at a mesh until it is what was asked for, and tells people what changes meanwhile."""

    def __init__(self, client: GenerationClient, num_shards: int, *, quiet: bool) -> None:
        """Begin.

        Args:
            client: of the coordinator that was asked.
            num_shards: that it was asked for.
            quiet: whether nobody is told.

        """
        self._client = client
        self._num_shards = num_shards
        self._quiet = quiet
        self._told = ""

    async def wait(self, timeout_s: float) -> GetMeshResponse:
        """Wait until the mesh serves with so many shards; a coordinator that is away may come back meanwhile.

        Raises:
            MeshError: it did not within `timeout_s` seconds, or others are wanted by now.

        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._wait()
        except TimeoutError:
            found = self._told or "it was asked for, and no more is known"
            raise MeshError(f"after {timeout_s:g} s {found}; the mesh goes on, coordctl status shows how far") from None
        except asyncio.CancelledError:
            click.echo("no longer followed; the mesh goes on, coordctl status shows how far", err=True)
            raise

    async def _wait(self) -> GetMeshResponse:
        taken = False
        while True:
            try:
                mesh = await self._client.mesh()
            except (WorkerLost, NotServing) as error:
                self._tell(str(error))
            else:
                if serves(mesh, self._num_shards):
                    return mesh
                # Coordinators with a lease hear of the number a little later.
                if taken and mesh.wanted_shards != self._num_shards:
                    raise MeshError(
                        f"{mesh.wanted_shards} shards are wanted by now, no longer {self._num_shards}: "
                        "somebody asked for them, or the coordinator was started anew"
                    )
                taken = mesh.wanted_shards == self._num_shards
                found = f"served by {show_shards(mesh.num_shards)}" if mesh.serving else "no full mesh serves"
                self._tell(f"{found}, {self._num_shards} wanted: {mesh.reshard_obstacle or 'under way'}")
            await asyncio.sleep(LOOK_S)

    async def settle(self, mesh: GetMeshResponse) -> GetMeshResponse:
        """Wait until it is known how long requests paused, but not for ever: there may have been none to pause."""
        until_s = time.monotonic() + SETTLE_S
        while not mesh.recovery.last_replay_ns and mesh.load.running + mesh.load.waiting and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
            # It is done, whoever may be away by now.
            with contextlib.suppress(WorkerLost, NotServing):
                mesh = await self._client.mesh()
        return mesh

    def _tell(self, text: str) -> None:
        if text != self._told and not self._quiet:
            click.echo(text, err=True)
        self._told = text


def _pause(before: GetMeshResponse, mesh: GetMeshResponse) -> str:
    if mesh.recovery.reshards <= before.recovery.reshards:
        return ""
    paused_s = sum(_parts(mesh).values())
    if not paused_s:
        return "no stream was running; "
    return f"callers' streams paused {paused_s:.3f} s ({show_parts(mesh.recovery)}); "


def _parts(mesh: GetMeshResponse) -> dict[str, float]:
    last = mesh.recovery
    return {
        "detect": last.last_detect_ns / 1e9,
        "assemble": last.last_assemble_ns / 1e9,
        "canary": last.last_canary_ns / 1e9,
        "replay": last.last_replay_ns / 1e9,
    }


def _shards(mesh: GetMeshResponse) -> list[tuple[int, str]]:
    return sorted((worker.shard, worker.address) for worker in mesh.workers if worker.serving)


def _workers(mesh: GetMeshResponse) -> str:
    return ", ".join(address for _, address in _shards(mesh))


def _as_dict(before: GetMeshResponse, mesh: GetMeshResponse, seconds: float) -> dict[str, object]:
    is_new = mesh.recovery.reshards > before.recovery.reshards
    return {
        "num_shards": mesh.num_shards,
        "num_shards_before": before.num_shards,
        "seconds": seconds,
        "paused_s": _parts(mesh) if is_new else None,
        "epoch": mesh.epoch,
        "plan_digest": mesh.plan_digest.hex(),
        "workers": [{"shard": shard, "address": address} for shard, address in _shards(mesh)],
    }
