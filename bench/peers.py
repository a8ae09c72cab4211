"""Tokens per second beside llama.cpp, and transformers if asked for: one model, one machine, one run.

    python -m venv /tmp/llama
    CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    .venv/bin/python -m bench.peers bench/models/a3b-4l --python /tmp/llama/bin/python --output peers

Built from source, because ready-made wheels may lack the instructions of this CPU. llama.cpp gets random weights in Q4_0 with
the geometry of MODEL/config.json, a Qwen3-MoE; shardmesh random int4 ones, which have as many bits. Every system starts anew in
every round, one after the other, so that neighbours on a shared machine disturb all alike; nothing else should run. Shown are
medians over rounds of the runs' own medians, minimum and maximum over all repeats, and ratios of medians to the first
llama.cpp. Writes OUTPUT.json (every run as it was) and OUTPUT.md.

The peers' clocks stop when logits are there; that of `coordctl bench` when its caller has the token.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.random_gguf import write_gguf

CHILD = Path(__file__).with_name("peer_child.py")
INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
IMPORT_LIMIT_S = 60.0
MEASURES = ("prefill", "decode")


@dataclass(frozen=True)
class System:
    """One row of the table."""

    name: str
    command: tuple[str, ...]
    """Prints one JSON object with tokens/s of prefill and decode."""


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--python", default=sys.executable, help="Interpreter that has llama-cpp-python.  [default: this one]")
@click.option("--llama-threads", default="2,1", show_default=True, help="Of llama.cpp, each a row.")
@click.option("--meshes", default="1x2,2x1,4x1", show_default=True, help="Workers x threads of shardmesh, each a row.")
@click.option("--transformers", is_flag=True, help="Also transformers in bf16, as many threads as llama.cpp's first.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Within a run.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each system.")
@click.option("--limit-s", type=click.FloatRange(min=1), default=600, show_default=True, help="Of each run, loading included.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("peers"), show_default=True, help="Without a suffix.")
def main(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Measure shardmesh and its peers on the geometry of MODEL."""
    # As Ctrl-C does: the child ends, and the folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    check_llama_cpp(flags["python"])
    runs: dict[System, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="shardmesh-peers-") as folder:
        gguf = Path(folder) / "random.gguf"
        systems = list_systems(gguf, flags)
        write_gguf(json.loads((flags["model"] / "config.json").read_text()), gguf)
        for number in range(flags["rounds"]):
            for system in systems:
                click.echo(f"round {number + 1} of {flags['rounds']}: {system.name}", err=True)
                runs[system].append(run_child(system.command, flags["limit_s"]))
                # After each run: what was measured stays, whatever comes.
                flags["output"].with_suffix(".json").write_text(json.dumps(as_dict(runs, flags), indent=1) + "\n")
    table = markdown(as_dict(runs, flags))
    flags["output"].with_suffix(".md").write_text(table)
    click.echo(table)


def check_llama_cpp(python: str) -> None:
    """See that an interpreter has llama-cpp-python.

    Raises:
        click.ClickException: it has not, or does not start.

    """
    command = (python, "-c", "import llama_cpp")
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=IMPORT_LIMIT_S)  # noqa: S603  # as the user says
    except (OSError, subprocess.SubprocessError):
        raise click.ClickException(
            f"{python} cannot import llama_cpp: {INSTALL} in an environment of its own, and --python its interpreter"
        ) from None


def list_systems(gguf: Path, flags: dict[str, Any]) -> list[System]:
    """List what takes turns, the one that ratios are to first.

    Raises:
        click.BadParameter: --llama-threads or --meshes is not of numbers.

    """
    lengths = [f"--{name}={flags[name.replace('-', '_')]}" for name in ("prompt-tokens", "new-tokens", "repeats")]
    try:
        threads = [int(count) for count in flags["llama_threads"].split(",")]
        meshes = [(int(shards), int(count)) for shards, count in (mesh.split("x") for mesh in flags["meshes"].split(","))]
    except ValueError:
        raise click.BadParameter("--llama-threads must look like 2,1 and --meshes like 1x2,2x1") from None
    llama = (flags["python"], str(CHILD), "llama.cpp", str(gguf), *lengths)
    systems = [System(f"llama.cpp Q4_0, {count_threads(count)}", (*llama, f"--threads={count}")) for count in threads]
    model = str(flags["model"])
    mesh = (sys.executable, "-m", "coordinator", "bench", "--json", "--load-format=random", f"--model={model}", "--quantize=int4")
    systems += [
        System(f"shardmesh int4, {shards} x {count}", (*mesh, f"--shards={shards}", f"--threads={count}", *lengths))
        for shards, count in meshes
    ]
    if flags["transformers"]:
        command = (sys.executable, str(CHILD), "transformers", model, *lengths, f"--threads={threads[0]}")
        systems.append(System(f"transformers bf16, {count_threads(threads[0])}", command))
    return systems


def count_threads(count: int) -> str:
    """Write a number of threads out."""
    return f"{count} thread{'s' if count > 1 else ''}"


def run_child(command: tuple[str, ...], limit_s: float) -> dict[str, Any]:
    """Run a command that prints one JSON object; its mistakes are ours, and past its time it is killed with all it started."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: S603  # ours
        try:
            output, _ = process.communicate(timeout=limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise click.ClickException(f"not done after {limit_s:g} s: {' '.join(command)}") from None
            raise
    if process.returncode < 0:
        raise click.ClickException(f"killed by {signal.Signals(-process.returncode).name}: {' '.join(command)}")
    if process.returncode:
        sys.exit(process.returncode)
    found: dict[str, Any] = json.loads(output)
    return found


def as_dict(runs: dict[System, list[dict[str, Any]]], flags: dict[str, Any]) -> dict[str, Any]:
    """Make the object that is kept: rows with ratios, and all runs."""
    rows = [summarize(system.name, found) for system, found in runs.items()]
    for row in rows:
        for measure in MEASURES:
            row[measure]["ratio"] = row[measure]["median"] / rows[0][measure]["median"]
    return {
        **{name: flags[name] for name in ("prompt_tokens", "new_tokens", "repeats", "rounds")},
        "rows": rows,
        "runs": {system.name: found for system, found in runs.items()},
    }


def summarize(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one row: medians over runs, minimum and maximum over all repeats, tokens/s."""
    row: dict[str, Any] = {"name": name}
    for measure in MEASURES:
        spreads = [run[measure]["tokens_per_s"] for run in runs]
        row[measure] = {
            "min": min(spread["min"] for spread in spreads),
            "median": statistics.median(spread["median"] for spread in spreads),
            "max": max(spread["max"] for spread in spreads),
        }
    return row


def markdown(results: dict[str, Any]) -> str:
    """Write the table, and below it what it was measured with."""
    titles = ("system", f"prefill {results['prompt_tokens']}", "ratio", f"decode {results['new_tokens']}", "ratio")
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for row in results["rows"]:
        cells = [row["name"]]
        for measure, digits in zip(MEASURES, (0, 1), strict=True):
            low, median, high = (f"{row[measure][key]:.{digits}f}" for key in ("min", "median", "max"))
            cells += [f"{median} [{low}-{high}]", f"{row[measure]['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\nTokens/s, median [min-max] of {results['rounds']} runs of {results['repeats']} repeats.")
    last = [found[-1] for found in results["runs"].values()]
    machine = next((run["machine"] for run in last if "machine" in run), None)
    if machine:
        lines[-1] += f" {machine['cpu']}, {machine['cores']} cores, shardmesh {machine['shardmesh']}, torch {machine['torch']}."
    versions = {", ".join(f"{name} {value}" for name, value in run["peer"].items()): None for run in last if "peer" in run}
    lines += [f"{version}." for version in versions]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
