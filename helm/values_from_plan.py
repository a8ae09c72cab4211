r"""Values of the chart for a model: what its workers and coordinators need, computed from what `coordctl plan` says.

coordctl plan --model DIR_OR_HUB_ID --shards 4 --quantize int8 --json | python helm/values_from_plan.py > values.yaml

It prints shards, model.hubId where the model is a hub id, dtype, quantization, seconds to start, tokens of KV cache, and memory.

Workers change the number of shards without a stall if they have room for both plans:

coordctl plan --model DIR_OR_HUB_ID --shards 2 --quantize int8 --json > two.json
coordctl plan --model DIR_OR_HUB_ID --shards 4 --quantize int8 --json \
  | python helm/values_from_plan.py --beside two.json > values.yaml
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TextIO

import click

MIB = 2**20

WORKER_MIB = 512
"""Of a worker beside weights and KV: Python, torch, gRPC, the tensors of a step. Measured: 270 MiB for SmolLM2, peak."""
COORDINATOR_MIB = 1024
"""Of a coordinator beside the embedding: the same, the tokenizer, what requests keep. Measured: 310 MiB for SmolLM2 in all."""

MODEL_BYTES_PER_S = 50e6
"""At which a coordinator is assumed to download or read a model: a share of a gigabit line, or a slow volume. Not measured."""
LEAST_STARTUP_S = 600
"""The chart's own model.startupSeconds."""

_SAME = ("model", "dtype", "quantization")
_DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_STEP_MIB = 64
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@click.command()
@click.argument("plan", type=click.File(), default="-")
@click.option(
    "--kv-tokens", type=click.IntRange(min=1), default=65536, show_default=True, help="Tokens of KV cache to make room for."
)
@click.option("--beside", type=click.File(), help="Plan of another number of shards; workers get room for both at once.")
def main(plan: TextIO, kv_tokens: int, beside: TextIO | None) -> None:
    """Print values for PLAN, the output of `coordctl plan --json` (default: standard input)."""
    try:
        outline = json.load(plan)
        other = json.load(beside) if beside else None
        values = values_for(outline, kv_tokens, other)
        alike = not other or all(other[key] == outline[key] for key in _SAME)
    except (ValueError, KeyError, TypeError):
        raise click.ClickException("PLAN must be what coordctl plan --json prints") from None
    if not alike:
        raise click.ClickException(f"both plans must have the same {', '.join(_SAME)}: only shards may be others")
    worker = values["worker"]["resources"]["limits"]["memory"]
    click.echo(f"# {outline['model']}, {outline['dtype']}, {kv_tokens} tokens of KV cache. On a GPU, {worker} of its memory.")
    click.echo(f"# model.startupSeconds: {MODEL_BYTES_PER_S / 1e6:.0f} MB/s are assumed, and {LEAST_STARTUP_S} s are the least.")
    # JSON is YAML.
    click.echo(json.dumps(values, indent=2))


def values_for(outline: dict[str, Any], kv_tokens: int, other: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compute the values that follow from a plan.

    Args:
        outline: the object that `coordctl plan --json` prints.
        kv_tokens: tokens of KV cache.
        other: likewise, of a plan that workers hold beside it for a while.

    """
    shards = outline["shards"]
    # Whoever holds the largest slice of the one may get the largest slice of the other.
    worker = sum(_largest_slice(one, kv_tokens) for one in (outline, other) if one)
    dtype_bytes = _DTYPE_BYTES[outline["dtype"]]
    embedding = outline["vocabulary"] * outline["hidden"] * dtype_bytes
    # Files are not quantized; a worker does that when it loads them.
    startup = math.ceil(outline["parameters"] * dtype_bytes / MODEL_BYTES_PER_S)
    model = {"dtype": outline["dtype"], "quantize": outline["quantization"], "startupSeconds": max(startup, LEAST_STARTUP_S)}
    if _HUB_ID.fullmatch(outline["model"]) and not Path(outline["model"]).exists():
        model = {"hubId": outline["model"], **model}
    return {
        "shards": len(shards),
        "allowUneven": len(shards).bit_count() != 1,
        "model": model,
        "coordinator": {"kvTokens": kv_tokens, "resources": _memory(embedding + COORDINATOR_MIB * MIB)},
        "worker": {"resources": _memory(worker + WORKER_MIB * MIB)},
    }


def _largest_slice(outline: dict[str, Any], kv_tokens: int) -> int:
    return max(int(shard["weight_bytes"] + kv_tokens * shard["kv_bytes_per_token"]) for shard in outline["shards"])


def _memory(num_bytes: int) -> dict[str, dict[str, str]]:
    # Asked for and limited alike: a worker that must give memory back is a worker that dies.
    quantity = f"{-(-num_bytes // (_STEP_MIB * MIB)) * _STEP_MIB}Mi"
    return {"requests": {"memory": quantity}, "limits": {"memory": quantity}}


if __name__ == "__main__":
    main()
