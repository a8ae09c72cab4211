"""`coordctl serve`: the coordinator as a service."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from coordinator.app import Coordinator
from coordinator.commands.options import insecure_option, mesh_options, model_options, model_settings
from coordinator.commands.running import run
from coordinator.config import ServeSettings
from coordinator.progress import LoadProgress
from coordinator.served_model import ServedModel
from protos.log import configure_logging


@click.command()
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--listen", required=True, metavar="HOST:PORT", help="Where callers connect; also unix:PATH.")
@click.option("--workers", required=True, metavar="A,B,...", help="Addresses of the workers, spares included.")
@click.option("--shards", type=click.IntRange(min=1), help="Default: the largest power of two that the workers allow.")
@model_options
@mesh_options
@click.option(
    "--max-rows", type=click.IntRange(1, 8192), default=512, show_default=True, help="Rows of one step: the prefill chunk."
)
@click.option("--max-running", type=click.IntRange(1, 4096), default=64, show_default=True, help="Sequences of one step.")
@click.option(
    "--max-waiting", type=click.IntRange(1), default=256, show_default=True, help="Requests that queue; more are refused."
)
@click.option(
    "--grace", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds that running requests get at SIGTERM."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@insecure_option
def serve(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Serve a model on workers that run already."""
    configure_logging(flags["log_level"])
    settings = ServeSettings(
        model=model_settings(flags),
        listen=flags["listen"],
        workers=tuple(address.strip() for address in flags["workers"].split(",") if address.strip()),
        insecure=flags["insecure"],
        shards=flags["shards"],
        kv_tokens=flags["kv_tokens"],
        max_rows=flags["max_rows"],
        max_running=flags["max_running"],
        max_waiting=flags["max_waiting"],
    )
    run(_serve(settings, flags["grace"]))


async def _serve(settings: ServeSettings, grace_s: float) -> None:
    model = await asyncio.to_thread(ServedModel.open, settings.model)
    with LoadProgress() as progress:
        coordinator = await Coordinator.start(settings, model, progress)
    click.echo(f"serving {settings.model.model} on {coordinator.address}")
    try:
        await coordinator.wait()
    except asyncio.CancelledError:
        await coordinator.stop(grace_s)
    except BaseException:
        await coordinator.stop(0)
        raise
