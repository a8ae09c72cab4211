"""Runs `coordctl bench` over configurations that take turns, and keeps what it said as JSON, a Markdown table and a plot.

    .venv/bin/python bench/table.py bench/models/a3b-4l --load-format random --rounds 3 --output results

Writes results.json (every run as it was) and results.md, and results.png where matplotlib is installed (`pip install
'shardmesh[bench]'`). Each round starts every configuration anew, one after the other: a shared machine is as slow as its
neighbours allow, and so they disturb all alike. Numbers are medians over rounds of the runs' own medians.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

MESHES = "1x2,2x1,4x1"
QUANTIZATIONS = "int4,int8,none"
MIB = 2**20


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    shards: int
    threads: int
    quantization: str

    @property
    def name(self) -> str:
        """As in the table; without quantization weights are kept in the checkpoint's own dtype."""
        weights = "whole" if self.quantization == "none" else self.quantization
        return f"{weights}, {self.shards} x {self.threads}"


@click.command()
@click.argument("model")
@click.option("--load-format", type=click.Choice(["auto", "random"]), default="auto", show_default=True)
@click.option("--meshes", default=MESHES, show_default=True, help="Workers x threads of each.")
@click.option("--quantizations", default=QUANTIZATIONS, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 64), default=8, show_default=True, help="Beside one stream alone.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Within a run.")
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Runs of each configuration.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Without a suffix.")
def main(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Measure all configurations of MODEL."""
    configurations = read_configurations(flags["meshes"], flags["quantizations"])
    runs: dict[Configuration, list[dict[str, Any]]] = {configuration: [] for configuration in configurations}
    for number in range(flags["rounds"]):
        for configuration in configurations:
            click.echo(f"round {number + 1} of {flags['rounds']}: {configuration.name}", err=True)
            runs[configuration].append(run_bench(configuration, flags))
            # After each run: what was measured stays, whatever comes.
            write_json(flags["output"].with_suffix(".json"), runs)
    rows = [summarize(configuration, found) for configuration, found in runs.items()]
    table = markdown(rows, runs[configurations[0]][0])
    flags["output"].with_suffix(".md").write_text(table)
    click.echo(table)
    if importlib.util.find_spec("matplotlib"):
        plot(rows, flags["output"].with_suffix(".png"))
    else:
        click.echo("no plot: matplotlib is missing (pip install 'shardmesh[bench]')", err=True)


def read_configurations(meshes: str, quantizations: str) -> list[Configuration]:
    """Read "1x2,2x1" and "int4,none": all of the one with all of the other."""
    try:
        sizes = [tuple(map(int, mesh.split("x"))) for mesh in meshes.split(",")]
        return [Configuration(shards, threads, kind) for kind in quantizations.split(",") for shards, threads in sizes]
    except ValueError:
        raise click.BadParameter(f"--meshes must look like {MESHES}, found {meshes}") from None


def run_bench(configuration: Configuration, flags: dict[str, Any]) -> dict[str, Any]:
    """Run `coordctl bench` once; its mistakes are ours."""
    command = [sys.executable, "-m", "coordinator", "bench", "--json", "--model", flags["model"]]
    command += ["--shards", str(configuration.shards), "--threads", str(configuration.threads)]
    command += ["--quantize", configuration.quantization]
    for name in ("load_format", "prompt_tokens", "new_tokens", "concurrency", "repeats"):
        command += ["--" + name.replace("_", "-"), str(flags[name])]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603  # ourselves
    if result.returncode:
        sys.exit(result.returncode)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def write_json(path: Path, runs: dict[Configuration, list[dict[str, Any]]]) -> None:
    """Keep all runs, one after the other."""
    path.write_text(json.dumps([one for found in runs.values() for one in found], indent=1) + "\n")


def summarize(configuration: Configuration, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one row: medians over runs."""

    def median(*keys: str) -> float | None:
        values = [_dig(run, keys) for run in runs]
        return None if None in values else statistics.median(values)

    return {
        "name": configuration.name,
        "prefill": median("prefill", "tokens_per_s", "median"),
        "decode": median("decode", "tokens_per_s", "median"),
        "streams": median("concurrent", "decode", "tokens_per_s", "median"),
        **{part: median("per_token", f"{part}_ms") for part in ("compute", "wire", "coordinator")},
        "overhead_us": median("round", "overhead_us", "median"),
        "ratio": median("round", "ratio"),
        "fraction": median("roofline", "fraction"),
        "peak_rss": max(worker["peak_rss_bytes"] for run in runs for worker in run["workers"]),
        "slice": max(worker["slice_bytes"] for run in runs for worker in run["workers"]),
    }


def _dig(found: Any, keys: tuple[str, ...]) -> Any:  # noqa: ANN401  # JSON
    for key in keys:
        found = None if found is None else found[key]
    return found


def markdown(rows: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """Write the table, and below it what it was measured with."""
    titles = (
        *("weights, workers x threads", f"prefill {run['prompt_tokens']}", f"decode {run['new_tokens']}"),
        *([f"{run['concurrent']['streams']} streams"] if run["concurrent"] else []),
        *("compute", "wire", "coordinator", "round beyond compute", "to bare gRPC", "of memory's rate", "slice", "peak RSS"),
    )
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for row in rows:
        cells = [row["name"], f"{row['prefill']:.0f}", f"{row['decode']:.1f}"]
        cells += [f"{row['streams']:.1f}"] if run["concurrent"] else []
        cells += [f"{row[part]:.1f} ms" for part in ("compute", "wire", "coordinator")]
        cells += [f"{row['overhead_us']:.0f} us", f"{row['ratio']:.2f}"]
        cells += ["-" if row["fraction"] is None else f"{100 * row['fraction']:.0f} %"]
        cells += [f"{row[size] / MIB:.0f} MiB" for size in ("slice", "peak_rss")]
        lines.append("| " + " | ".join(cells) + " |")
    machine = run["machine"]
    lines.append(f"\nTokens/s, ms a decoded token. {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}.")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw decode and prefill beside where the time of a token goes."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional

    names = [row["name"] for row in rows]
    figure = Figure(figsize=(15, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, key, title in ((axes[0], "decode", "decode, tokens/s"), (axes[1], "prefill", "prefill, tokens/s")):
        bars = axis.barh(names, [row[key] for row in rows], color="#4878a8")
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.margins(x=0.15)
        axis.set_title(title)
    left = [0.0] * len(rows)
    for part, colour in (("compute", "#4878a8"), ("wire", "#e0a040"), ("coordinator", "#a04848")):
        axes[2].barh(names, [row[part] for row in rows], left=left, label=part, color=colour)
        left = [start + row[part] for start, row in zip(left, rows, strict=True)]
    axes[2].set_title("a decoded token, ms")
    axes[2].legend()
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
