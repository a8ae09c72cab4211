"""The `shardworker` command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from protos.errors import MeshError
from protos.log import configure_logging

if TYPE_CHECKING:
    from collections.abc import Coroutine

EXIT_MISTAKE = 2
STOP_GRACE_S = 0.5
LEVELS = ("debug", "info", "warning", "error", "critical")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardmesh")
def main() -> None:
    """Serve a slice of a model to a shardmesh coordinator."""


@main.command()
@click.option("--listen", required=True, metavar="ADDRESS", help="HOST:PORT (port 0: any free one) or unix:PATH.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Threads that compute on the CPU.  [default: torch's choice]")
@click.option("--insecure", is_flag=True, help="Allow TCP without TLS.")
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True, help="Of the log on standard error.")
@click.option("--until-stdin-closes", is_flag=True, help="End when standard input does, and remove the socket's empty folder.")
def serve(*, listen: str, device: str, threads: int | None, insecure: bool, log_level: str, until_stdin_closes: bool) -> None:
    """Wait for a plan, load its slices, serve its rounds. Ends by SIGTERM or SIGINT."""
    configure_logging(log_level)
    try:
        stopped = _run(_serve(listen, device=device, threads=threads, insecure=insecure, until_stdin_closes=until_stdin_closes))
    except MeshError as error:
        click.echo(f"shardworker: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    if not stopped:
        # A job still runs on the device; waiting for it would be waiting for a caller who has left.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(work: Coroutine[None, None, bool]) -> bool:
    try:
        import uvloop  # noqa: PLC0415  # not on every platform
    except ImportError:
        return asyncio.run(work)
    stopped: bool = uvloop.run(work)
    return stopped


async def _serve(listen: str, *, device: str, threads: int | None, insecure: bool, until_stdin_closes: bool) -> bool:
    """Serve until told to stop; whether everything ended in time."""
    from shardworker.app import start_worker  # noqa: PLC0415  # torch takes seconds; --help and mistakes need none

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    worker = await start_worker(listen, device=device, threads=threads, insecure=insecure)
    if until_stdin_closes:
        threading.Thread(target=_watch_stdin, args=(loop, stop), name="stdin", daemon=True).start()
    click.echo(f"listening on {worker.address}")
    await stop.wait()
    stopped = await worker.stop(STOP_GRACE_S)
    if until_stdin_closes and listen.startswith("unix:"):
        # The parent made the folder for this socket, and may be gone.
        with contextlib.suppress(OSError):
            Path(listen.removeprefix("unix:")).parent.rmdir()
    return stopped


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(stop.set)
