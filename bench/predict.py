"""What the formula of `bench/model.py` says of a mesh that nobody has here: every constant is given on the command line.

.venv/bin/python -m bench.predict tests/data/configs/qwen3-30b-a3b.json --quantize int4 --rtt-us 200 --gbit 10
    --round-us 300 --shard-us 100 --byte-ns 5 --memory-gb 60 --tflops 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from bench.model import Costs, Mesh, Network, step_s
from coordinator.config import QUANTIZATIONS, WIRES
from coordinator.models.config import Config
from coordinator.models.registry import describe
from coordinator.planning.sizes import weight_bytes
from protos.tensor_pb2 import DTYPE_BF16


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--round-us", type=click.FloatRange(min=0), required=True, help="Of a round, however little it carries.")
@click.option("--shard-us", type=click.FloatRange(min=0), required=True, help="More for each worker.")
@click.option("--byte-ns", type=click.FloatRange(min=0), required=True, help="More for each byte on the wire.")
@click.option("--memory-gb", type=click.FloatRange(min=0, min_open=True), required=True, help="Read by a worker in a second.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), required=True, help="Of a worker with many rows.")
@click.option("--shards", default="1,2,4,8,16", show_default=True)
@click.option("--streams", default="1,16,64", show_default=True)
@click.option("--quantize", type=click.Choice(list(QUANTIZATIONS)), default="none", show_default=True)
@click.option("--wire", type=click.Choice(list(WIRES)), default="bf16", show_default=True)
@click.option("--context-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of each stream.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--rtt-us", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--gbit", type=click.FloatRange(min=0, min_open=True), default=math.inf, show_default=True, help="Of each port.")
def main(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Print a Markdown table of what the formula says of CONFIG, a model's config.json."""
    config: Path = flags["config"]
    spec = describe(Config(str(config), json.loads(config.read_text())))
    costs = Costs(
        round_s=flags["round_us"] / 1e6,
        shard_s=flags["shard_us"] / 1e6,
        byte_s=flags["byte_ns"] / 1e9,
        bytes_per_s=flags["memory_gb"] * 1e9,
        operations_per_s=flags["tflops"] * 1e12,
    )
    case = Case(
        [int(count) for count in flags["streams"].split(",")],
        flags["context_tokens"],
        flags["prompt_tokens"],
        costs,
        Network(flags["rtt_us"] / 1e6, flags["gbit"] * 1e9 / 8),
    )
    click.echo(titles(case))
    for shards in map(int, flags["shards"].split(",")):
        mesh = Mesh.cut(spec, shards, dtype=DTYPE_BF16, quantization=QUANTIZATIONS[flags["quantize"]], wire=WIRES[flags["wire"]])
        click.echo(row(mesh, case))


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked of every mesh."""

    streams: Sequence[int]
    context_tokens: int
    """Of each stream."""
    prompt_tokens: int
    costs: Costs
    network: Network


def titles(case: Case) -> str:
    """Write the table's head."""
    names = ["workers", "a slice", *(f"{count} streams" if count > 1 else "1 stream" for count in case.streams)]
    names += ["rounds", "network", "worker", f"prefill {case.prompt_tokens}"]
    return "| " + " | ".join(names) + " |\n|" + " ---: |" * len(names)


def row(mesh: Mesh, case: Case) -> str:
    """Write a line: tokens per second of so many streams; of one stream's token the ms of rounds, network and worker; prefill."""
    costs, network = case.costs, case.network
    one = mesh.step(1, 1, case.context_tokens)
    idle = replace(costs, bytes_per_s=math.inf, operations_per_s=math.inf)
    rounds_s = step_s(one, idle, Network())
    network_s = step_s(one, idle, network) - rounds_s
    worker_s = step_s(one, costs, network) - rounds_s - network_s
    slices = (weight_bytes(plan) for plan in mesh.shards)
    rates = (count / step_s(mesh.step(count, count, count * case.context_tokens), costs, network) for count in case.streams)
    prefill_s = sum(step_s(step, costs, network) for step in mesh.prefill(case.prompt_tokens))
    cells = [str(one.shards), f"{max(slices) / 1e9:.1f} GB", *(f"{rate:.1f}" for rate in rates)]
    cells += [*(f"{part * 1e3:.1f} ms" for part in (rounds_s, network_s, worker_s)), f"{case.prompt_tokens / prefill_s:.0f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
