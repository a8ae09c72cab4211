"""The table of benchmarks: which configurations, and medians over their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from bench.table import Configuration, markdown, read_configurations, summarize, write_json


def run(decode: float, *, concurrent: bool = True, roofline: bool = True) -> dict[str, Any]:
    """What `coordctl bench --json` says, as far as the table reads it."""
    rate = {"tokens_per_s": {"min": 0, "median": decode, "max": 99}}
    return {
        "prompt_tokens": 16,
        "new_tokens": 8,
        "prefill": {"tokens_per_s": {"median": 10 * decode}},
        "decode": rate,
        "concurrent": {"streams": 4, "decode": {"tokens_per_s": {"median": 3 * decode}}} if concurrent else None,
        "per_token": {"compute_ms": 5.0, "wire_ms": 2.0, "coordinator_ms": 1.0},
        "round": {"overhead_us": {"median": 400.0}, "ratio": 1.25},
        "roofline": {"fraction": 0.5} if roofline else None,
        "workers": [{"slice_bytes": 2**20, "peak_rss_bytes": 2**20 * decode}],
        "machine": {"cpu": "CPU", "cores": 2, "torch": "2"},
    }


def test_all_meshes_are_run_with_all_quantizations() -> None:
    assert read_configurations("1x2,4x1", "int4,none") == [
        Configuration(1, 2, "int4"),
        Configuration(4, 1, "int4"),
        Configuration(1, 2, "none"),
        Configuration(4, 1, "none"),
    ]


@pytest.mark.parametrize("meshes", ["", "2", "2x", "1x2x3", "axb"])
def test_a_mesh_is_workers_and_threads(meshes: str) -> None:
    with pytest.raises(click.BadParameter, match="--meshes must look like 1x2,2x1,4x1"):
        read_configurations(meshes, "int4")


def test_a_row_is_medians_over_runs_and_the_highest_memory() -> None:
    row = summarize(Configuration(2, 1, "none"), [run(10), run(50), run(20)])
    assert row["name"] == "whole, 2 x 1"
    assert (row["prefill"], row["decode"], row["streams"], row["fraction"]) == (200, 20, 60, 0.5)
    assert row["peak_rss"] == 50 * 2**20


def test_table_has_a_line_for_each_row() -> None:
    found = run(10)
    lines = markdown([summarize(Configuration(1, 2, "int4"), [found])], found).splitlines()
    assert "prefill 16 | decode 8 | 4 streams" in lines[0]
    assert lines[2] == ("| int4, 1 x 2 | 100 | 10.0 | 30.0 | 5.0 ms | 2.0 ms | 1.0 ms | 400 us | 1.25 | 50 % | 1 MiB | 10 MiB |")
    assert {line.count("|") for line in lines[:3]} == {13}


def test_table_leaves_out_what_was_not_measured() -> None:
    found = run(10, concurrent=False, roofline=False)
    lines = markdown([summarize(Configuration(1, 2, "int4"), [found])], found).splitlines()
    assert "streams" not in lines[0]
    assert "| - |" in lines[2]
    assert {line.count("|") for line in lines[:3]} == {12}


def test_all_runs_are_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {Configuration(1, 1, "int4"): [run(1), run(2)], Configuration(2, 1, "int4"): [run(3)]})
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [one["decode"]["tokens_per_s"]["median"] for one in kept] == [1, 2, 3]
