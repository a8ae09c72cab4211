"""`coordctl bench`: tokens per second of a private mesh, where their time goes, and how far the machine would let it go."""

from __future__ import annotations

import json
from typing import Any

import click

from coordinator.bench.load import Workload
from coordinator.bench.measure import measure
from coordinator.bench.mesh import MeshSettings
from coordinator.commands.console import table_console
from coordinator.commands.options import json_option, model_settings, private_mesh_options
from coordinator.commands.running import run
from coordinator.progress import StatusLine
from protos.log import configure_logging

MAX_STREAMS = 64
"""As many as a coordinator takes into one step."""


@click.command()
@private_mesh_options
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
    caller of the private mesh sees them. One unmeasured repeat comes first.
    """
    configure_logging("error")
    run(_bench(flags))


async def _bench(flags: dict[str, Any]) -> None:
    work = Workload(flags["prompt_tokens"], flags["new_tokens"], flags["concurrency"], flags["repeats"])
    with StatusLine() as status:
        report = await measure(mesh_settings(flags), work, status)
    if flags["as_json"]:
        click.echo(json.dumps(report.as_dict()))
    else:
        report.print(table_console())


def mesh_settings(flags: dict[str, Any]) -> MeshSettings:
    """Make settings of the flags that `private_mesh_options` added."""
    return MeshSettings(model_settings(flags), flags["shards"], flags["threads"], flags["device"], flags["kv_tokens"])
