"""`coordctl api-key`: a key for one caller of a coordinator, or for one operator."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.api_keys import add_key


@click.command()
@click.argument("name")
@click.option(
    "--file",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file of coordctl serve --api-keys; it gets a line with the key's hash.",
)
@click.option("--max-calls", type=click.IntRange(1, 999_999), help="Most Generate calls at once.  [default: no limit]")
@click.option("--operator", "is_operator", is_flag=True, help="The key may change the mesh: coordctl reshard.")
def api_key(name: str, path: Path, max_calls: int | None, *, is_operator: bool) -> None:
    """Make a random key for NAME and print it: it is shown this once, and only its hash is kept."""
    click.echo(add_key(path, name, max_calls, is_operator=is_operator))
