"""`coordctl plan`: who would hold what, and what it takes; loads nothing and needs no worker.

Reads config.json and safetensors headers. Of a model that is not here but on the hub only the configuration is fetched, and
the plan is made from that alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from coordinator.commands.console import show_bytes, table_console
from coordinator.commands.options import json_option, model_options
from coordinator.config import DTYPES, QUANTIZATIONS
from coordinator.models.checkpoint import Checkpoint, has_weights
from coordinator.models.config import read_config
from coordinator.models.hub import resolve
from coordinator.models.layout import has_own_head, num_parameters
from coordinator.models.registry import describe
from coordinator.planning.plan import MeshPlan, default_dtype, plan_mesh
from coordinator.planning.sizes import column_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from coordinator.models.spec import ModelSpec
    from coordinator.planning.slicing import Span
    from protos.plan_pb2 import Quantization


@click.command()
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--shards", type=int, default=1, show_default=True, help="Workers that hold the model.")
@model_options
@json_option
def plan(model: str, shards: int, dtype: str, quantize: str, load_format: str, *, as_json: bool) -> None:
    """Show who holds what, weight bytes of each worker and KV bytes of a token."""
    directory = resolve(model, weights=False)
    config = read_config(directory)
    spec = describe(config)
    checkpoint = _open_checkpoint(directory, load_format)
    mesh = plan_mesh(
        spec,
        checkpoint,
        shards,
        dtype=default_dtype(config, checkpoint) if dtype == "auto" else DTYPES[dtype],
        quantization=QUANTIZATIONS[quantize],
    )
    own_head = has_own_head(spec, checkpoint.tensors if checkpoint else None)
    outline = Outline(model, spec, mesh, num_parameters(spec, own_head=own_head), headers=checkpoint is not None)
    if as_json:
        click.echo(json.dumps(outline.as_dict()))
    else:
        outline.print(table_console())


def _open_checkpoint(directory: Path, load_format: str) -> Checkpoint | None:
    if load_format == "random":
        return None
    # Without weights, of a hub id or of a folder that has only its config.json, the configuration is enough; a folder that has
    # some of its weights is looked into, and says which are missing.
    if has_weights(directory) or any(directory.glob("*.safetensors*")):
        return Checkpoint.open(directory)
    return None


@dataclass(frozen=True, slots=True)
class Outline:
    """A plan as a person, or a program, sees it."""

    model: str
    spec: ModelSpec
    mesh: MeshPlan
    parameters: int
    headers: bool
    """Whether the checkpoint's headers were read and agree."""

    @property
    def dtype(self) -> str:
        """As on the command line."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.mesh.shards[0].dtype)

    @property
    def quantization(self) -> str:
        """Of the layers' matrices, as on the command line."""
        return _quantization_name(self.mesh.shards[0].quantization)

    @property
    def head_quantization(self) -> str:
        """Of the output head, likewise."""
        return _quantization_name(self.mesh.shards[0].head_quantization)

    def as_dict(self) -> dict[str, object]:
        """Make the object of `--json`; ranges are half-open [start, end], sizes are bytes."""
        spec, mesh = self.spec, self.mesh
        shards = [
            {
                "shard": shard.shard,
                "heads": [shard.heads.start, shard.heads.end],
                "kv_heads": [shard.kv_heads.start, shard.kv_heads.end],
                **{f"{kind}_columns": list(span) for kind, span in column_ranges(shard).items()},
                "vocabulary": [shard.vocabulary.start, shard.vocabulary.end],
                "weight_bytes": mesh.weight_bytes[shard.shard],
                "kv_bytes_per_token": mesh.kv_bytes_per_token[shard.shard],
            }
            for shard in mesh.shards
        ]
        return {
            "model": self.model,
            "family": spec.family,
            "parameters": self.parameters,
            "layers": spec.num_layers,
            "hidden": spec.hidden,
            "vocabulary": spec.vocabulary,
            "context": spec.context,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "head_quantization": self.head_quantization,
            "headers_checked": self.headers,
            "plan_digest": mesh.digest.hex(),
            "shards": shards,
            "total_weight_bytes": sum(mesh.weight_bytes),
            "total_kv_bytes_per_token": sum(mesh.kv_bytes_per_token),
        }

    def print(self, console: Console) -> None:
        """Print a table, one line for each shard; ranges are half-open start:end (length)."""
        spec, mesh = self.spec, self.mesh
        quantized = "" if self.quantization == "none" else f", {self.quantization} weights"
        if self.head_quantization != self.quantization:
            quantized += f" ({self.head_quantization} head)"
        console.print(
            f"{self.model}: {spec.family}, {_show_count(self.parameters)} parameters, {spec.num_layers} layers, "
            f"context {spec.context}, {self.dtype}{quantized}",
            highlight=False,
            markup=False,
        )
        kinds = list(column_ranges(mesh.shards[0]))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("shard", "heads", "kv heads", *(f"{kind} columns" for kind in kinds), "vocabulary"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("weights", justify="right", no_wrap=True)
        table.add_column("KV per token", justify="right", no_wrap=True)
        for shard, weights, kv in zip(mesh.shards, mesh.weight_bytes, mesh.kv_bytes_per_token, strict=True):
            ranges = column_ranges(shard)
            spans = [(shard.heads.start, shard.heads.end), (shard.kv_heads.start, shard.kv_heads.end)]
            spans += [*ranges.values(), (shard.vocabulary.start, shard.vocabulary.end)]
            table.add_row(str(shard.shard), *_show_spans(spans), show_bytes(weights), show_bytes(kv))
        total = (show_bytes(sum(mesh.weight_bytes)), show_bytes(sum(mesh.kv_bytes_per_token)))
        table.add_row("all", *[""] * (3 + len(kinds)), *total, style="bold")
        console.print(table)
        if not self.headers:
            console.print("Planned from config.json alone: no weights were looked at.", highlight=False)


def _quantization_name(quantization: Quantization) -> str:
    return next(name for name, kind in QUANTIZATIONS.items() if kind == quantization)


def _show_count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 10**9 else f"{count / 1e6:.2f} million"


def _show_spans(spans: Sequence[Span]) -> list[str]:
    return [f"{start}:{end} ({end - start})" for start, end in spans]
