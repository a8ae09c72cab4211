"""Puts measured tables into a page, each between two comments that name it.

    .venv/bin/python -m bench.render docs/performance.md table=results.json network=network.json

`table` is the JSON of bench/table.py, `network` that of bench/network.py. What stands in the page between `<!-- table -->` and
`<!-- /table -->` is replaced. Nothing else changes, and no number is made here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.network import Case, Run
from bench.network import markdown as network_markdown
from bench.table import Configuration, summarize
from bench.table import markdown as table_markdown

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command()
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tables", nargs=-1, required=True, metavar="NAME=FILE...")
def main(page: Path, tables: tuple[str, ...]) -> None:
    """Fill the tables of PAGE."""
    text = page.read_text()
    for table in tables:
        name, _, file = table.partition("=")
        if name not in TABLES or not file:
            raise click.UsageError(f"wanted NAME=FILE with a name of {', '.join(TABLES)}, found {table}")
        text = fill(text, name, TABLES[name](json.loads(Path(file).read_text())))
    page.write_text(text)


def fill(text: str, name: str, table: str) -> str:
    """Replace what stands between the comments of a table.

    Raises:
        ClickException: the comments are missing, or stand there twice.

    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise click.ClickException(f"the page needs {begin.strip()} and then {end}, each once and on a line of its own")
    return f"{text.partition(begin)[0]}{begin}\n{table.strip()}\n\n{end}{text.partition(end)[2]}"


def render_table(runs: list[dict[str, Any]]) -> str:
    """Make the table of runs of `coordctl bench`, in the order in which configurations first appear."""
    found: dict[Configuration, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(Configuration(run["shards"], run["threads"], run["quantization"]), []).append(run)
    return table_markdown([summarize(configuration, same) for configuration, same in found.items()], runs[0])


def render_network(runs: list[dict[str, Any]]) -> str:
    """Make the table of runs of bench/network.py."""
    return network_markdown([Run(Case(**run["case"]), run["rtt_s"], run["report"]) for run in runs])


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {"table": render_table, "network": render_network}


if __name__ == "__main__":
    main()
