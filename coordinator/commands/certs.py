"""`coordctl certs`: certificates for one machine, to try TLS before there is a proper authority."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.certificates import make_set

DEFAULT_DAYS = 365


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="DNS name or IP address by which callers reach the coordinator, besides this machine's own; may be given several times.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=DEFAULT_DAYS, show_default=True, help="How long they are valid.")
def certs(directory: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a CA, and certificates of a coordinator, of workers and of callers, each a folder in DIR for --tls."""
    for folder in make_set(directory, hosts, days):
        click.echo(str(folder))
