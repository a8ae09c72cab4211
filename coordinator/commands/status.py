"""`coordctl status`: workers, plan, load and health of a running mesh."""

from __future__ import annotations

import json
import sys

import click
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.client import GenerationClient
from coordinator.commands.options import insecure_option, json_option
from coordinator.commands.running import run
from protos import rpc
from protos.generation_pb2 import GetMeshResponse, GetModelResponse, MeshWorker


@click.command()
@click.option("--coordinator", required=True, metavar="HOST:PORT", help="The coordinator to ask.")
@insecure_option
@json_option
def status(coordinator: str, *, insecure: bool, as_json: bool) -> None:
    """Show workers, epoch, plan, load and health."""
    run(_status(rpc.check_address(coordinator, insecure=insecure), as_json=as_json))


FILE_WIDTH = 200


async def _status(address: str, *, as_json: bool) -> None:
    async with GenerationClient(address) as client:
        model, mesh = await client.model(), await client.mesh()
    if as_json:
        click.echo(json.dumps(_as_dict(model, mesh)))
    else:
        _print(model, mesh)


def _as_dict(model: GetModelResponse, mesh: GetMeshResponse) -> dict[str, object]:
    # 64-bit numbers as numbers, digests as hex: what a script expects.
    load = {descriptor.name: getattr(mesh.load, descriptor.name) for descriptor in mesh.load.DESCRIPTOR.fields}
    workers = []
    for worker in mesh.workers:
        fields = {descriptor.name: getattr(worker, descriptor.name) for descriptor in worker.DESCRIPTOR.fields}
        workers.append({**fields, "plan_digest": worker.plan_digest.hex()})
    return {
        "serving": mesh.serving,
        "epoch": mesh.epoch,
        "num_shards": mesh.num_shards,
        "plan_digest": mesh.plan_digest.hex(),
        "model": MessageToDict(model, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
        "workers": workers,
        "load": load,
    }


def _print(model: GetModelResponse, mesh: GetMeshResponse) -> None:
    # Without a terminal there is no width to keep to.
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    health = "[green]serving[/green]" if mesh.serving else "[red]not serving[/red]"
    assignment = f"epoch {mesh.epoch}, plan {mesh.plan_digest.hex()[:12]}"
    console.print(f"{model.model} ({model.family}) on {mesh.num_shards} shards: {health}, {assignment}")
    table = Table("worker", "role", "device", "threads", "weights", "KV", "free memory", "peak RSS", box=None)
    for worker in mesh.workers:
        table.add_row(*_row(worker))
    console.print(table)
    load = mesh.load
    console.print(
        f"{load.running} running, {load.waiting} waiting, KV {load.used_pages * load.page_tokens} of "
        f"{load.total_pages * load.page_tokens} tokens, {load.completion_tokens} tokens generated "
        f"in {load.steps} steps, {load.preemptions} preemptions"
    )


def _row(worker: MeshWorker) -> tuple[str, ...]:
    if not worker.reachable:
        return worker.address, f"[red]unreachable[/red]: {escape(worker.error)}", "", "", "", "", "", ""
    sizes = (worker.weights_bytes, worker.kv_bytes, worker.memory_free_bytes, worker.peak_rss_bytes)
    return (
        worker.address,
        f"shard {worker.shard}" if worker.serving else "spare",
        worker.device,
        str(worker.num_threads),
        *(f"{size / 2**30:.2f} GiB" for size in sizes),
    )
