"""`coordctl top`: a running mesh at work, as a table that renews itself."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.client import GenerationClient
from coordinator.commands.console import show_bytes, show_shards, table_console
from coordinator.commands.options import Seconds, caller_credentials, caller_options, json_option
from coordinator.commands.running import run
from protos import rpc
from protos.errors import InvalidArgument, MeshError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coordinator.client import Credentials
    from protos.generation_pb2 import GetMeshResponse, MeshWorker

_PARTS = ("compute", "queue", "wire", "wait")
_MOST_EXPERTS = 8
_S = 1e9


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker between two looks."""

    address: str
    role: str
    """`shard N`, `spare` or `unreachable`."""
    shares: dict[str, float]
    """Of the time: compute, queue, wire, wait, as in `coordinator.tally`; the rest is the coordinator's, or idle."""
    weights_bytes: int
    kv_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True, slots=True)
class MeshView:
    """A mesh between two looks; rates are per second."""

    serving: bool
    epoch: int
    num_shards: int
    wanted_shards: int
    """Another number while the mesh is cut anew."""
    reshard_obstacle: str
    """Why that could not be done yet; empty if nothing is in its way."""
    running: int
    waiting: int
    kv_usage: float
    """Share of the KV cache in use."""
    prompt_tokens_per_s: float
    tokens_per_s: float
    steps_per_s: float
    preemptions: int
    """Since start."""
    proven_ago_s: float
    workers: list[WorkerView]
    experts: list[dict[str, float]]
    """Hottest first: layer, expert, share, over_mean."""
    recoveries: int
    failures: dict[str, int]
    """Since start, by reason."""
    reshards: int
    """Since start."""
    last_failure: str
    last_stall_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """What the coordinator said, and when."""

    mesh: GetMeshResponse
    at_s: float


def view(before: Look, now: Look) -> MeshView:
    """Make rates of two looks."""
    seconds = now.at_s - before.at_s
    old, new, recovery = before.mesh.load, now.mesh.load, now.mesh.recovery
    earlier = {worker.address: worker for worker in before.mesh.workers}
    stall_ns = recovery.last_detect_ns + recovery.last_assemble_ns + recovery.last_canary_ns + recovery.last_replay_ns
    return MeshView(
        serving=now.mesh.serving,
        epoch=now.mesh.epoch,
        num_shards=now.mesh.num_shards,
        wanted_shards=now.mesh.wanted_shards,
        reshard_obstacle=now.mesh.reshard_obstacle,
        running=new.running,
        waiting=new.waiting,
        kv_usage=new.used_pages / new.total_pages if new.total_pages else 0.0,
        # A coordinator that was started anew counts from 0 again.
        prompt_tokens_per_s=max(0, new.prompt_tokens - old.prompt_tokens) / seconds,
        tokens_per_s=max(0, new.completion_tokens - old.completion_tokens) / seconds,
        steps_per_s=max(0, new.steps - old.steps) / seconds,
        preemptions=new.preemptions,
        proven_ago_s=now.mesh.proven_ago_ns / _S,
        workers=[_worker(earlier.get(worker.address), worker, seconds) for worker in now.mesh.workers],
        experts=[
            {"layer": one.layer, "expert": one.expert, "share": one.share, "over_mean": one.over_mean}
            for one in now.mesh.hottest_experts
        ],
        recoveries=recovery.recoveries,
        failures=dict(recovery.failures),
        reshards=recovery.reshards,
        last_failure=recovery.last_failure,
        last_stall_s=stall_ns / _S,
    )


def _worker(before: MeshWorker | None, now: MeshWorker, seconds: float) -> WorkerView:
    role = (f"shard {now.shard}" if now.serving else "spare") if now.reachable else "unreachable"
    spent_ns = {
        part: getattr(now.rounds, f"{part}_ns") - (getattr(before.rounds, f"{part}_ns") if before else 0) for part in _PARTS
    }
    shares = {part: max(0, spent) / _S / seconds for part, spent in spent_ns.items()}
    return WorkerView(now.address, role, shares, now.weights_bytes, now.kv_bytes, now.memory_free_bytes)


@click.command()
@click.option("--coordinator", required=True, metavar="HOST:PORT", help="The coordinator to ask.")
@click.option("--interval", type=Seconds(0.2, 60.0), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look twice, print what happened between, and end.")
@caller_options
@json_option
def top(coordinator: str, interval: float, *, once: bool, **flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Show workers, load, tokens per second, hot experts and recoveries, renewed until Ctrl-C."""
    address = rpc.check_address(coordinator, insecure=flags["insecure"], tls=flags["tls"] is not None)
    credentials = caller_credentials(flags)
    if once:
        run(_once(address, credentials, interval, as_json=flags["as_json"]))
        return
    if flags["as_json"]:
        raise InvalidArgument("--json prints one object: say --once too")
    console = table_console()
    if not console.is_terminal or console.is_dumb_terminal:
        raise InvalidArgument("a table that renews itself needs a terminal that can move its cursor: say --once")
    run(_live(address, credentials, interval))


async def _once(address: str, credentials: Credentials, interval: float, *, as_json: bool) -> None:
    async with GenerationClient(address, credentials) as client:
        before = await _look(client)
        await asyncio.sleep(interval)
        found = view(before, await _look(client))
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        table_console().print(render(found))


async def _live(address: str, credentials: Credentials, interval: float) -> None:
    async with GenerationClient(address, credentials) as client:
        before = await _look(client)
        shown: RenderableType = Text(f"asking {address} ...")
        with Live(shown, console=table_console(), screen=True, auto_refresh=False) as live:
            while True:
                try:
                    await asyncio.sleep(interval)
                    now = await _look(client)
                    shown, before = render(view(before, now)), now
                except MeshError as error:
                    # It may come back; what was known last stays, and how old it is.
                    age_s = time.monotonic() - before.at_s
                    live.update(Group(Text(f"no answer for {age_s:.0f} s: {error}", style="bold red"), shown), refresh=True)
                    continue
                except asyncio.CancelledError:
                    # Ctrl-C is how it ends.
                    return
                live.update(shown, refresh=True)


async def _look(client: GenerationClient) -> Look:
    return Look(await client.mesh(), time.monotonic())


def render(found: MeshView) -> RenderableType:
    """Make lines and tables for people."""
    health = ("serving", "green") if found.serving else ("not serving", "red")
    parts: list[RenderableType] = [
        Text.assemble(health, f" on {show_shards(found.num_shards)}, epoch {found.epoch}, proven {found.proven_ago_s:.1f} s ago"),
        Text(
            f"{found.running} running, {found.waiting} waiting, KV {found.kv_usage:.0%}, {found.tokens_per_s:.1f} tokens/s, "
            f"prompts {found.prompt_tokens_per_s:.1f} tokens/s, {found.steps_per_s:.1f} steps/s, {found.preemptions} preemptions"
        ),
        _workers(found),
    ]
    if found.experts:
        parts.append(_experts(found))
    # An older coordinator does not tell.
    if found.wanted_shards not in {0, found.num_shards}:
        obstacle = found.reshard_obstacle or "under way"
        parts.append(Text(f"{show_shards(found.wanted_shards)} wanted: {obstacle}", style="yellow"))
    if found.failures or found.reshards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.failures.items())) or "0"
        counts = f"{found.recoveries} recoveries; failures: {reasons}; {found.reshards} reshards"
        parts.append(Text(f"{counts}; the latest stall {found.last_stall_s:.2f} s"))
    if found.last_failure:
        parts.append(Text(f"latest failure: {found.last_failure}"))
    return Group(*parts)


def _workers(found: MeshView) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("worker", "role", *_PARTS, "weights", "KV", "free memory"):
        table.add_column(title, overflow="fold", justify="left" if title in {"worker", "role"} else "right")
    for worker in found.workers:
        shares = [f"{worker.shares[part]:.0%}" for part in _PARTS]
        sizes = map(show_bytes, (worker.weights_bytes, worker.kv_bytes, worker.memory_free_bytes))
        # Text and not str: an address is no markup.
        table.add_row(*map(Text, (worker.address, worker.role, *shares, *sizes)))
    return table


def _experts(found: MeshView) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("hot expert", "share", "over mean", ""):
        table.add_column(title, justify="left" if title in {"hot expert", ""} else "right")
    for one in found.experts[:_MOST_EXPERTS]:
        bar = Text("█" * round(min(20.0, 2 * one["over_mean"])), style="red")
        table.add_row(f"{one['expert']:.0f} of layer {one['layer']:.0f}", f"{one['share']:.1%}", f"{one['over_mean']:.1f}", bar)
    return table
