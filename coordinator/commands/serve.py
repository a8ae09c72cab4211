"""`coordctl serve`: the coordinator as a service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from coordinator.app import Coordinator
from coordinator.commands.options import Seconds, insecure_option, mesh_options, model_options, model_settings, tls_option
from coordinator.commands.running import run
from coordinator.config import WEIGHTS, DiscoverySettings, SecuritySettings, ServeSettings
from coordinator.progress import LoadProgress
from coordinator.served_model import ServedModel
from protos.log import FORMATS, configure_logging
from protos.rpc import ROUND_TIMEOUT_S

STARTUP_S = 60.0
"""How long listed workers are waited for at the start, unless told otherwise."""


@click.command()
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--listen", required=True, metavar="HOST:PORT", help="Where callers connect; also unix:PATH.")
@click.option("--workers", default="", metavar="A,B,...", help="Addresses of the workers, spares included.")
@click.option(
    "--discover",
    metavar="WHERE",
    help="Or: find them, and whoever comes later. dns:NAME:PORT, or kubernetes:[NAMESPACE/]SERVICE:PORT for the endpoints of a "
    "headless Service.",
)
@click.option(
    "--lease",
    metavar="NAMESPACE/NAME",
    help="Share the workers with other coordinators: only the holder of this Kubernetes Lease hands out plans.",
)
@click.option(
    "--startup-timeout",
    type=Seconds(min=0),
    help=f"Seconds that enough workers are waited for at the start.  [default: {STARTUP_S:g}; with --discover for ever]",
)
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
    "--grace", type=Seconds(min=0), default=30.0, show_default=True, help="Seconds that running requests get at SIGTERM."
)
@click.option(
    "--round-timeout",
    type=Seconds(min=0.1),
    default=ROUND_TIMEOUT_S,
    show_default=True,
    help="Seconds after which a worker that does not answer a round of a few rows is given up; long prompts get more.",
)
@click.option(
    "--recovery-timeout",
    type=Seconds(min=0),
    default=60.0,
    show_default=True,
    help="Seconds that requests wait for another mesh when theirs breaks.",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="shared",
    show_default=True,
    help="How workers come by their slices: shared: they see the model's folder under the same path; stream: they are sent them.",
)
@click.option("--warm-spares", is_flag=True, help="Spares keep the model's files in their page cache.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@click.option("--log-format", type=click.Choice(FORMATS), help="Of the log.  [default: console at a terminal, json otherwise]")
@tls_option
@click.option(
    "--caller-tls",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the certificate that callers see.  [default: that of --tls]",
)
@click.option("--require-caller-certificate", is_flag=True, help="Callers must show a certificate of the CA in ca.crt.")
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Callers must show an API key of this file; see coordctl api-key.",
)
@click.option("--health-listen", metavar="HOST:PORT", help="Health alone, in plaintext, for probes that speak no TLS.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Metrics for Prometheus, by plain HTTP; port 0: any free one.")
@click.option(
    "--trace-to",
    metavar="URL",
    envvar=["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
    show_envvar=True,
    help="OpenTelemetry collector that gets traces by OTLP over gRPC: http://HOST:PORT, or https://HOST:PORT for TLS.",
)
@insecure_option
def serve(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Serve a model on workers that run already."""
    configure_logging(flags["log_level"], flags["log_format"])
    settings = ServeSettings(
        model=model_settings(flags),
        listen=flags["listen"],
        workers=tuple(address.strip() for address in flags["workers"].split(",") if address.strip()),
        insecure=flags["insecure"],
        discovery=DiscoverySettings(
            discover=flags["discover"],
            lease=flags["lease"],
            startup_s=STARTUP_S if flags["startup_timeout"] is None and not flags["discover"] else flags["startup_timeout"],
        ),
        security=SecuritySettings(
            tls=flags["tls"],
            caller_tls=flags["caller_tls"],
            require_caller_certificate=flags["require_caller_certificate"],
            api_keys=flags["api_keys"],
        ),
        health_listen=flags["health_listen"],
        metrics_listen=flags["metrics_listen"],
        trace_to=flags["trace_to"],
        shards=flags["shards"],
        kv_tokens=flags["kv_tokens"],
        max_rows=flags["max_rows"],
        max_running=flags["max_running"],
        max_waiting=flags["max_waiting"],
        recovery_s=flags["recovery_timeout"],
        round_timeout_s=flags["round_timeout"],
        warm_spares=flags["warm_spares"],
        weights=flags["weights"],
    )
    run(_serve(settings, flags["grace"]))


async def _serve(settings: ServeSettings, grace_s: float) -> None:
    model = await asyncio.to_thread(ServedModel.open, settings.model)
    with LoadProgress() as progress:
        coordinator = await Coordinator.start(settings, model, progress)
    click.echo(f"serving {settings.model.model} on {coordinator.address}")
    if coordinator.metrics_url:
        click.echo(f"metrics on {coordinator.metrics_url}")
    try:
        await coordinator.wait()
    except asyncio.CancelledError:
        await coordinator.stop(grace_s)
    except BaseException:
        await coordinator.stop(0)
        raise
