"""What a worker computes of Qwen3-30B-A3B on a GPU: decoding and prefill, beside the memory's bound and transformers.

    python bench/gpu.py --json gpu.json

Full geometry, random weights, all layers on one GPU through the same kernels, loading apart, that a worker uses; hidden rows
come from the CPU and go back to it twice a layer, as in a mesh. What lies between workers (gRPC, sums, gates) is left out. The
bound is the time in which the bytes that a step must read (weights of the experts that were chosen, each once; keys and
values) cross a memory of the speed that is measured first. bf16 needs about 64 GiB of GPU memory for each of the two systems,
which take turns; int4 takes 17 GiB. Nobody has run this yet: the kernels are known to be right under Triton's interpreter and
to compile, and that is all.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from rich.table import Table

from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_NONE
from shardworker.kernels.choose import choose_kernels
from shardworker.kernels.cuda.weights import stored
from shardworker.kernels.interface import HeadSpec, Span

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.plan_pb2 import Quantization
    from shardworker.kernels.interface import Kernels, StepAttention, Weight

GIB = 2**30
PAGE_TOKENS = 16
QUANTIZATIONS = {"bf16": QUANTIZATION_NONE, "int4": QUANTIZATION_INT4}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of Qwen3-30B-A3B."""

    layers: int = 48
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    chosen: int = 8
    columns: int = 768
    vocabulary: int = 151936


class Layers:
    """A whole model's slices on one device, without what a coordinator keeps."""

    def __init__(self, geometry: Geometry, kernels: Kernels, quantization: Quantization, num_tokens: int) -> None:
        """Take memory for weights and for `num_tokens` keys and values, and fill both."""
        self.geometry, self.kernels = geometry, kernels
        g, dim = geometry, geometry.head_dim
        shapes = {
            "qkv": ((g.heads + 2 * g.kv_heads) * dim, g.hidden),
            "o": (g.hidden, g.heads * dim),
            "gate_up": (g.experts, 2 * g.columns, g.hidden),
            "down": (g.experts, g.hidden, g.columns),
        }
        self.weights = [{name: self._weight(shape, quantization) for name, shape in shapes.items()} for _ in range(g.layers)]
        self.head = self._weight((g.vocabulary, g.hidden), quantization)
        self.norm = torch.ones(g.heads + g.kv_heads, dim, dtype=torch.bfloat16, device=kernels.device)
        self.pool = torch.randn(g.layers, 2, g.kv_heads, num_tokens, dim, dtype=torch.bfloat16, device=kernels.device)
        frequencies = 1e6 ** (-torch.arange(0, dim, 2, device=kernels.device) / dim)
        readers = tuple(head * g.kv_heads // g.heads for head in range(g.heads))
        self.heads = HeadSpec(
            g.heads, g.kv_heads, dim, readers, dim**-0.5, 1e-6, 0.0, dim, frequencies, 1.0, None, torch.bfloat16
        )

    def _weight(self, shape: tuple[int, ...], quantization: Quantization) -> Weight:
        weight = self.kernels.empty_weight(shape, quantization, torch.bfloat16, self.kernels.device)
        values, scales, bits = stored(weight)  # type: ignore[arg-type]  # of `CudaKernels`, see `main`
        if bits:
            values.random_(0, 256)
            scales.fill_(0.01)
        else:
            values.normal_(std=0.02)
        return weight

    def step(self, spans: list[Span], hidden: torch.Tensor, routes: list[torch.Tensor]) -> torch.Tensor:
        """One step of all layers, the last rows' logits on the CPU; `hidden` is on the CPU."""
        device = self.kernels.device
        attention = self.kernels.begin(self.heads, spans, PAGE_TOKENS)
        expert_weights = torch.full(routes[0].shape, 1 / self.geometry.chosen)
        for weights, (keys, values), chosen in zip(self.weights, self.pool, routes, strict=True):
            x = hidden.to(device, non_blocking=True)
            self._attend(weights, x, attention, keys, values).cpu()
            x = hidden.to(device, non_blocking=True)
            self.kernels.experts(x, chosen, expert_weights, weights["gate_up"], weights["down"]).cpu()
        last = torch.tensor([span.rows.stop - 1 for span in spans])
        return self.head.matmul(hidden[last].to(device)).argmax(-1).cpu()

    def _attend(
        self, weights: dict[str, Weight], x: torch.Tensor, attention: StepAttention, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        qkv = weights["qkv"].matmul(x).view(x.shape[0], -1, self.geometry.head_dim)
        return weights["o"].matmul(attention(qkv, self.norm, None, keys, values))

    def step_bytes(self, routes: list[torch.Tensor], held_tokens: int) -> int:
        """Bytes that a step must read: each weight that is used once, and the keys and values of `held_tokens`."""
        total = self.head.nbytes
        for weights, chosen in zip(self.weights, routes, strict=True):
            used = len(chosen.unique()) / self.geometry.experts
            total += weights["qkv"].nbytes + weights["o"].nbytes
            total += int(used * (weights["gate_up"].nbytes + weights["down"].nbytes))
        return total + held_tokens * self.pool.nbytes // self.pool.shape[3]


def spans_at(num_rows: list[int], position: int) -> list[Span]:
    """Sequences that lie one after the other in the pool, all of them at `position`."""
    spans, row, page = [], 0, 0
    for count in num_rows:
        pages = -(-(position + count) // PAGE_TOKENS)
        spans.append(Span(slice(row, row + count), position, count, tuple(range(page, page + pages)), contiguous=True))
        row, page = row + count, page + pages
    return spans


def bytes_per_second(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Speed at which the memory is read: the median of sums over a buffer that no cache holds."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / statistics.median(timed(lambda: buffer.sum().item(), repeats))


def timed(act: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat; two more before them do not count. `act` ends when its result is on the CPU."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def measure(  # noqa: PLR0917  # what is measured
    geometry: Geometry, kernels: Kernels, precision: str, batches: list[int], context: int, prompt: int, repeats: int
) -> list[dict[str, object]]:
    """Rows of the table for one precision."""
    room = max(max(batches) * (context + PAGE_TOKENS), prompt + PAGE_TOKENS)
    layers = Layers(geometry, kernels, QUANTIZATIONS[precision], -(-room // PAGE_TOKENS) * PAGE_TOKENS)
    speed = bytes_per_second(kernels.device, 4 * GIB if kernels.device.type == "cuda" else GIB // 8, repeats)
    rows: list[dict[str, object]] = []
    for what, counts, position in [*(("decode", [1] * batch, context) for batch in batches), ("prefill", [prompt], 0)]:
        spans, tokens = spans_at(counts, position), sum(counts)
        hidden = torch.randn(tokens, geometry.hidden).to(torch.bfloat16)
        routes = [
            torch.rand(tokens, geometry.experts).topk(geometry.chosen).indices.int().contiguous() for _ in range(geometry.layers)
        ]
        seconds = timed(lambda s=spans, h=hidden, r=routes: layers.step(s, h, r), repeats)  # type: ignore[misc]
        bound = layers.step_bytes(routes, len(counts) * position) / speed
        rows.append(
            {
                "system": f"shardmesh worker, {precision}",
                "what": what,
                "sequences": len(counts),
                "tokens_per_second": sorted(tokens / each for each in seconds),
                "memory_bound_tokens_per_second": tokens / bound,
                "memory_bytes_per_second": speed,
            }
        )
    return rows


@torch.inference_mode()
def measure_transformers(batches: list[int], context: int, prompt: int, repeats: int) -> list[dict[str, object]]:
    """Rows of the table for transformers in bf16, its default implementation, random weights."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig  # noqa: PLC0415  # only here, and heavy

    g = Geometry()
    config = Qwen3MoeConfig(
        hidden_size=g.hidden,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        head_dim=g.head_dim,
        num_experts=g.experts,
        num_experts_per_tok=g.chosen,
        moe_intermediate_size=g.columns,
        vocab_size=g.vocabulary,
        max_position_embeddings=40960,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows: list[dict[str, object]] = []
    for what, batch, length in [*(("decode", batch, context) for batch in batches), ("prefill", 1, prompt)]:
        ids = torch.randint(0, g.vocabulary, (batch, length), device="cuda")
        if what == "prefill":
            seconds, tokens = timed(lambda i=ids: model(i, logits_to_keep=1).logits.argmax(-1).cpu(), repeats), prompt  # type: ignore[misc]
        else:
            # The cache grows by a token with each repeat, a few of `context`.
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            one = ids[:, -1:]
            seconds, tokens = timed(lambda c=cache, o=one: model(o, past_key_values=c).logits.argmax(-1).cpu(), repeats), batch  # type: ignore[misc]
        rows.append(
            {
                "system": "transformers, bf16",
                "what": what,
                "sequences": batch,
                "tokens_per_second": sorted(tokens / each for each in seconds),
            }
        )
    return rows


@click.command()
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(QUANTIZATIONS)), default=("bf16", "int4"))
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1, 16, 64), show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens that decoding builds on.")
@click.option("--prompt", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens of the prefill.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--transformers/--no-transformers", "with_transformers", default=True, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Also write all of it there.")
def main(  # noqa: PLR0917  # click gives each option
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    context: int,
    prompt: int,
    repeats: int,
    with_transformers: bool,  # noqa: FBT001
    path: Path | None,
) -> None:
    """Measure, and print a table."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA device here")
    kernels = choose_kernels(torch.device("cuda", 0), torch.get_num_threads())
    if kernels.name != "triton":
        raise click.ClickException("the Triton kernels cannot be used here, for the reason above")
    rows: list[dict[str, object]] = []
    for precision in precisions:
        with torch.inference_mode():
            rows += measure(Geometry(), kernels, precision, list(batches), context, prompt, repeats)
        torch.cuda.empty_cache()
    if with_transformers:
        rows += measure_transformers(list(batches), context, prompt, repeats)
    device = torch.cuda.get_device_name(0)
    if path:
        path.write_text(json.dumps({"device": device, "context": context, "rows": rows}, indent=1))
    show(device, rows)


def show(device: str, rows: list[dict[str, object]]) -> None:
    """Print a line for each measurement: minimum, median and maximum of tokens/s, and the part of the bound reached."""
    table = Table("system", "what", "sequences", "tokens/s", "(min to max)", "of memory's bound", title=device, box=None)
    for row in rows:
        speeds: list[float] = row["tokens_per_second"]  # type: ignore[assignment]
        median, bound = statistics.median(speeds), row.get("memory_bound_tokens_per_second")
        part = f"{median / float(str(bound)):.0%}" if bound else ""
        limits = f"{speeds[0]:.0f} to {speeds[-1]:.0f}"
        table.add_row(str(row["system"]), str(row["what"]), str(row["sequences"]), f"{median:.0f}", limits, part)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
