"""`coordctl profile`: a timeline of some tokens over coordinator, wire and workers."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import click

from coordinator.bench.load import Prompts, run_load
from coordinator.bench.mesh import MeshSettings, recorded_mesh
from coordinator.bench.timeline import trace_events
from coordinator.commands.bench import any_mesh_options, mesh_settings
from coordinator.commands.running import run
from protos.errors import InvalidArgument
from protos.log import configure_logging


@click.command()
@any_mesh_options
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where the trace goes (JSON).")
@click.option("--tokens", type=click.IntRange(min=1), default=8, show_default=True, help="Generated tokens to show.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Of the prompt, which is shown too."
)
def profile(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Write a Chrome trace of one stream of random tokens; open it at ui.perfetto.dev or chrome://tracing."""
    configure_logging("error")
    output: Path = flags["output"]
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise InvalidArgument(f"--output {output} must be a file that may be written, in a folder that exists")
    run(_profile(mesh_settings(flags), flags, output))


async def _profile(settings: MeshSettings, flags: dict[str, Any], output: Path) -> None:
    prompt_tokens, tokens = flags["prompt_tokens"], flags["tokens"]
    async with recorded_mesh(settings, prompt_tokens, tokens) as mesh:
        prompts = Prompts(mesh.spec.vocabulary)
        # The first one warms everything up.
        await run_load(mesh.client, [prompts.draw(prompt_tokens)], tokens)
        mesh.take_rounds()
        await run_load(mesh.client, [prompts.draw(prompt_tokens)], tokens)
        rounds = mesh.take_rounds()
    trace = {"displayTimeUnit": "ms", "traceEvents": trace_events(rounds)}
    await asyncio.to_thread(output.write_text, json.dumps(trace))
    click.echo(f"{output}: {len(rounds)} rounds of {len({one.step for one in rounds})} steps; open it at ui.perfetto.dev")
