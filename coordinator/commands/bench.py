"""`coordctl bench`: tokens per second of a mesh, where their time goes, and how far the machine would let it go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from coordinator.bench.load import Workload
from coordinator.bench.measure import measure
from coordinator.bench.mesh import MeshSettings
from coordinator.commands.console import table_console
from coordinator.commands.options import insecure_option, json_option, model_settings, private_mesh_options, tls_option
from coordinator.commands.running import run
from coordinator.progress import StatusLine
from protos.errors import InvalidArgument
from protos.log import configure_logging
from protos.rpc import check_address

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

MAX_STREAMS = 64
"""As many as a coordinator takes into one step."""


_PRIVATE = {"shards": "--shards", "threads": "--threads", "device": "--device"}


def any_mesh_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the flags of `private_mesh_options`, and those that name workers instead."""
    for option in (
        insecure_option,
        tls_option,
        click.option("--workers", metavar="A,B,...", help="Take these instead of a private mesh: nobody else may use them."),
        private_mesh_options,
    ):
        command = option(command)
    return command


@click.command()
@any_mesh_options
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Random ones, in each stream.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Generated in each stream.")
@click.option(
    "--concurrency", type=click.IntRange(1, MAX_STREAMS), default=1, show_default=True, help="Also so many streams at once."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="After one that does not count.")
@json_option
def bench(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Measure prefill and decoding, the overhead of a round, and the part of the memory's rate that workers reach.

    pp is a prompt by the time to its first token, tg the other tokens by the time from the first to the last one, both as the
    caller sees them. One unmeasured repeat comes first. With --workers, a shard on each, neither the bare gRPC echo nor the
    memory's rate is measured.
    """
    configure_logging("error")
    run(_bench(mesh_settings(flags), flags))


async def _bench(settings: MeshSettings, flags: dict[str, Any]) -> None:
    work = Workload(flags["prompt_tokens"], flags["new_tokens"], flags["concurrency"], flags["repeats"])
    with StatusLine() as status:
        report = await measure(settings, work, status)
    if flags["as_json"]:
        click.echo(json.dumps(report.as_dict()))
    else:
        report.print(table_console())


def mesh_settings(flags: dict[str, Any]) -> MeshSettings:
    """Make settings of the flags that `any_mesh_options` added.

    Raises:
        InvalidArgument: --workers beside flags of a private mesh, twice the same one, or TCP without --insecure.

    """
    model, kv_tokens = model_settings(flags), flags["kv_tokens"]
    if flags["workers"] is None:
        if flags["tls"]:
            raise InvalidArgument("--tls is for workers that run already: give --workers too")
        return MeshSettings(model, flags["shards"], flags["threads"], flags["device"], kv_tokens)
    source = click.get_current_context().get_parameter_source
    if given := [flag for name, flag in _PRIVATE.items() if source(name) is not ParameterSource.DEFAULT]:
        raise InvalidArgument(f"{', '.join(given)} cannot be chosen with --workers: each of them is a shard, as it was started")
    workers = tuple(address.strip() for address in flags["workers"].split(",") if address.strip())
    if not workers or len(set(workers)) < len(workers):
        raise InvalidArgument(f"--workers needs addresses, each once, found {flags['workers']!r}")
    for address in workers:
        check_address(address, insecure=flags["insecure"], tls=flags["tls"] is not None)
    return MeshSettings(model, len(workers), None, flags["device"], kv_tokens, workers, flags["insecure"], flags["tls"])
