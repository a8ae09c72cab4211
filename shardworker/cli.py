"""The `shardworker` command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog

from protos.log import FORMATS, configure_logging
from protos.program import run_program
from protos.rpc import check_address, check_metrics_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from shardworker.app import RunningWorker

STOP_GRACE_S = 0.5
LEVELS = ("debug", "info", "warning", "error", "critical")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardmesh")
def shardworker() -> None:
    """Serve a slice of a model to a shardmesh coordinator."""


@shardworker.command()
@click.option("--listen", required=True, metavar="ADDRESS", help="HOST:PORT (port 0: any free one) or unix:PATH.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Threads that compute on the CPU.  [default: torch's choice]")
@click.option(
    "--tls",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with tls.crt (for shardworker.shardmesh), tls.key and ca.crt: only coordinators of that CA are obeyed.",
)
@click.option("--insecure", is_flag=True, help="Allow TCP without TLS.")
@click.option("--health-listen", metavar="HOST:PORT", help="Health alone, in plaintext, for probes that speak no TLS.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Metrics for Prometheus, by plain HTTP; port 0: any free one.")
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True, help="Of the log on standard error.")
@click.option("--log-format", type=click.Choice(FORMATS), help="Of the log.  [default: console at a terminal, json otherwise]")
@click.option(
    "--embedded-in",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="DIR is private to the parent process: when standard input closes, end and remove it.",
)
def serve(
    *,
    listen: str,
    device: str,
    threads: int | None,
    tls: Path | None,
    insecure: bool,
    health_listen: str | None,
    metrics_listen: str | None,
    log_level: str,
    log_format: str | None,
    embedded_in: Path | None,
) -> None:
    """Wait for a plan, load its slices, serve its rounds. Ends by SIGTERM or SIGINT."""
    configure_logging(log_level, log_format)
    check_address(listen, insecure=insecure, tls=tls is not None)
    if health_listen:
        check_address(health_listen, insecure=True)
    if metrics_listen:
        check_metrics_address(metrics_listen)
    # torch takes seconds; --help and mistakes need none. Before the event loop, so that Ctrl-C works meanwhile.
    from shardworker.app import start_worker  # noqa: PLC0415

    async def start() -> RunningWorker:
        # In every line from here on: each call's context begins as a copy of this one.
        structlog.contextvars.bind_contextvars(worker=listen)
        return await start_worker(
            listen,
            device=device,
            threads=threads,
            insecure=insecure,
            tls_folder=tls,
            health_listen=health_listen,
            metrics_listen=metrics_listen,
        )

    try:
        stopped = _run(_serve(start, watch_stdin=embedded_in is not None))
    finally:
        if embedded_in is not None and _stdin_is_closed():
            # The parent is gone, or about to do the same.
            shutil.rmtree(embedded_in, ignore_errors=True)
    if not stopped:
        # A job still runs on the device; waiting for it would be waiting for a caller who has left.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@shardworker.command()
@click.option("--threads", type=click.IntRange(1, 4096), default=1, show_default=True, help="That read at the same time.")
@click.option("--seconds", type=click.FloatRange(0.01, 60.0), default=1.0, show_default=True, help="How long.")
@click.option("--wait", is_flag=True, help='Say "ready", and begin at a line on standard input: several can so read together.')
def measure_memory(*, threads: int, seconds: float, wait: bool) -> None:
    """Read random 1 MiB chunks of 1 GiB of memory; print {"bytes_per_s": ...}."""
    # --help needs no numpy.
    from shardworker.bandwidth import make_buffer, read_buffer  # noqa: PLC0415

    buffer = make_buffer()
    if wait:
        click.echo("ready")
        if not sys.stdin.readline():
            # Whoever wanted to know is gone.
            return
    click.echo(json.dumps({"bytes_per_s": read_buffer(buffer, threads, seconds)}))


def main() -> None:
    """Run the command line."""
    run_program("shardworker", shardworker)


def _run(work: Coroutine[None, None, bool]) -> bool:
    try:
        import uvloop  # noqa: PLC0415  # not on every platform
    except ImportError:
        return asyncio.run(work)
    stopped: bool = uvloop.run(work)
    return stopped


async def _serve(start: Callable[[], Awaitable[RunningWorker]], *, watch_stdin: bool) -> bool:
    """Serve until told to stop; whether everything ended in time."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    worker = await start()
    try:
        if watch_stdin:
            threading.Thread(target=_watch_stdin, args=(loop, stop), name="stdin", daemon=True).start()
        click.echo(f"listening on {worker.address}")
        if worker.metrics_url:
            click.echo(f"metrics on {worker.metrics_url}")
        await stop.wait()
    finally:
        stopped = await worker.stop(STOP_GRACE_S)
    return stopped


def _stdin_is_closed() -> bool:
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable) and not os.read(0, 1)


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(stop.set)
