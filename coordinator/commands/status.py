"""`coordctl status`: workers, plan, load and health of a running mesh."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from google.protobuf.json_format import MessageToDict
from rich.table import Table
from rich.text import Text

from coordinator.client import Credentials, GenerationClient
from coordinator.commands.console import show_bytes, show_parts, show_shards, table_console
from coordinator.commands.options import caller_credentials, caller_options, json_option
from coordinator.commands.running import run
from protos import rpc
from protos.generation_pb2 import GetMeshResponse, GetModelResponse, MeshRecovery, MeshWorker

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

_DIGEST_CHARACTERS = 12
"""Enough to tell plans apart."""


@click.command()
@click.option("--coordinator", required=True, metavar="HOST:PORT", help="The coordinator to ask.")
@caller_options
@json_option
def status(coordinator: str, **flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Show workers, epoch, plan, load and health."""
    address = rpc.check_address(coordinator, insecure=flags["insecure"], tls=flags["tls"] is not None)
    run(_status(address, caller_credentials(flags), as_json=flags["as_json"]))


async def _status(address: str, credentials: Credentials, *, as_json: bool) -> None:
    async with GenerationClient(address, credentials) as client:
        model, mesh = await client.model(), await client.mesh()
    if as_json:
        click.echo(json.dumps(_as_dict(model, mesh)))
    else:
        _print(model, mesh)


def _as_dict(model: GetModelResponse, mesh: GetMeshResponse) -> dict[str, object]:
    return {
        "serving": mesh.serving,
        "epoch": mesh.epoch,
        "num_shards": mesh.num_shards,
        "wanted_shards": mesh.wanted_shards,
        "reshard_obstacle": mesh.reshard_obstacle,
        "plan_digest": mesh.plan_digest.hex(),
        "model": MessageToDict(model, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
        "workers": [
            {**_fields(worker), "plan_digest": worker.plan_digest.hex(), "rounds": _fields(worker.rounds)}
            for worker in mesh.workers
        ],
        "load": _fields(mesh.load),
        "recovery": _fields(mesh.recovery) | {"failures": dict(mesh.recovery.failures)},
        "proven_ago_ns": mesh.proven_ago_ns,
    }


def _fields(message: Message) -> dict[str, object]:
    # 64-bit numbers as numbers: what a script expects.
    return {descriptor.name: getattr(message, descriptor.name) for descriptor in message.DESCRIPTOR.fields}


def _print(model: GetModelResponse, mesh: GetMeshResponse) -> None:
    console = table_console()
    health = ("serving", "green") if mesh.serving else ("not serving", "red")
    head = f"{model.model} ({model.family}) on {show_shards(mesh.num_shards)}: "
    plan = f", epoch {mesh.epoch}, plan {mesh.plan_digest.hex()[:_DIGEST_CHARACTERS]}"
    console.print(Text.assemble(head, health, plan), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("worker", "role", "version", "device", "kernels", "threads", "weights", "KV", "free memory", "peak RSS"):
        table.add_column(title, overflow="fold")
    for worker in mesh.workers:
        table.add_row(*_row(worker))
    console.print(table)
    for worker in mesh.workers:
        if not worker.reachable:
            console.print(Text.assemble((f"{worker.address} is unreachable: ", "red"), worker.error), soft_wrap=True)
    load = mesh.load
    console.print(
        f"{load.running} running, {load.waiting} waiting, KV {load.used_pages * load.page_tokens} of "
        f"{load.total_pages * load.page_tokens} tokens, {load.completion_tokens} tokens generated in {load.steps} steps, "
        f"{load.preemptions} preemptions",
        soft_wrap=True,
    )
    # An older coordinator does not tell.
    if mesh.wanted_shards not in {0, mesh.num_shards}:
        console.print(Text(f"{show_shards(mesh.wanted_shards)} wanted: {mesh.reshard_obstacle or 'under way'}"), soft_wrap=True)
    if mesh.recovery.failures or mesh.recovery.reshards:
        _print_recovery(console, mesh.recovery)


def _print_recovery(console: Console, recovery: MeshRecovery) -> None:
    failures = ", ".join(f"{count} {reason}" for reason, count in sorted(recovery.failures.items()))
    counts = f"failures: {failures or 0}; recoveries: {recovery.recoveries}; reshards: {recovery.reshards}"
    console.print(f"{counts}; the latest {show_parts(recovery)}", soft_wrap=True)
    if recovery.last_failure:
        console.print(Text(f"latest failure: {recovery.last_failure}"), soft_wrap=True)


def _row(worker: MeshWorker) -> tuple[Text, ...]:
    # Text and not str: what a worker says of itself is no markup.
    if not worker.reachable:
        return Text(worker.address), Text("unreachable", style="red")
    sizes = (worker.weights_bytes, worker.kv_bytes, worker.memory_free_bytes, worker.peak_rss_bytes)
    role = f"shard {worker.shard}" if worker.serving else "spare"
    computes = (worker.device, worker.kernels, str(worker.num_threads))
    texts = (worker.address, role, worker.version, *computes, *map(show_bytes, sizes))
    return tuple(map(Text, texts))
