"""Measured tables on a page: only what is between a table's comments changes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench.render import fill, main, render_table
from tests.bench.test_table import run

PAGE = "before\n<!-- table -->\nold\n<!-- /table -->\nafter\n"


def test_a_table_takes_the_place_of_the_old_one() -> None:
    once = fill(PAGE, "table", "| a |\n")
    assert once == "before\n<!-- table -->\n\n| a |\n\n<!-- /table -->\nafter\n"
    assert fill(once, "table", "| a |\n") == once


@pytest.mark.parametrize("page", ["", PAGE + PAGE, "<!-- /table -->\n<!-- table -->\n", "<!-- table -->\n"])
def test_a_page_needs_both_comments_once(page: str) -> None:
    with pytest.raises(click.ClickException, match="each once"):
        fill(page, "table", "x")


def test_runs_of_one_configuration_are_one_row() -> None:
    runs = [
        {**run(decode), "shards": shards, "threads": 1, "quantization": "int4"} for shards, decode in ((2, 10), (4, 5), (2, 30))
    ]
    lines = render_table(runs).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:4]] == [["| int4, 2 x 1", "200", "20.0"], ["| int4, 4 x 1", "50", "5.0"]]


def test_the_command_fills_a_page(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE)
    results.write_text(json.dumps([{**run(10), "shards": 1, "threads": 2, "quantization": "none"}]))
    assert CliRunner().invoke(main, [str(page), f"table={results}"]).exit_code == 0
    assert "| whole, 1 x 2 | 100 |" in page.read_text()
    assert CliRunner().invoke(main, [str(page), f"tables={results}"]).exit_code == 2
