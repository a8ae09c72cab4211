"""Time per token of a mesh beside transformers, on one model in one run; and each worker's memory beside its slice.

    .venv/bin/python bench/beside_transformers.py models/smollm2-135m-instruct --shards 1,2,4 --repeats 3

What is compared takes turns, and medians are shown: a shared machine is as slow as its neighbours allow. Greedy, float32 on
both sides, end-of-sequence tokens ignored; the tokens must be the same.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import defaultdict
from contextlib import AsyncExitStack

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from coordinator.app import Coordinator
from coordinator.client import GenerationClient
from coordinator.config import ModelSettings, ServeSettings
from coordinator.embedded import EmbeddedWorkers
from coordinator.served_model import ServedModel
from protos import generation_pb2
from protos.log import configure_logging

MIB = 2**20


@click.command()
@click.argument("model")
@click.option("--shards", default="1,2,4", show_default=True, help="Mesh sizes to measure.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def main(model: str, shards: str, prompt_tokens: int, new_tokens: int, repeats: int, *, as_json: bool) -> None:
    """Measure, and print a table."""
    configure_logging("error")
    counts = [int(count) for count in shards.split(",")]
    results = asyncio.run(measure(model, counts, prompt_tokens, new_tokens, repeats))
    if as_json:
        click.echo(json.dumps(results))
    else:
        show(results)


async def measure(model: str, counts: list[int], prompt_tokens: int, new_tokens: int, repeats: int) -> list[dict[str, object]]:
    """Run everything in turns; one row for transformers and one for each mesh."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, reference.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    tokens: dict[str, list[int]] = {}
    memory: dict[str, list[tuple[int, int]]] = {}
    async with AsyncExitStack() as stack:
        meshes = {f"mesh of {count}": await _start(stack, model, count) for count in counts}
        # The first round warms caches up and does not count.
        for repeat in range(repeats + 1):
            timed = {"transformers": _run_transformers(reference, prompt, new_tokens)}
            for name, client in meshes.items():
                timed[name] = await _run_mesh(client, prompt, new_tokens)
            for name, (ids, prefill_s, decode_s) in timed.items():
                tokens[name] = ids
                if repeat:
                    runs[name].append((prefill_s, decode_s))
        for name, client in meshes.items():
            workers = (await client.mesh()).workers
            memory[name] = [(worker.weights_bytes, worker.peak_rss_bytes) for worker in workers]
    return [
        {
            "system": name,
            "same_tokens": tokens[name] == tokens["transformers"],
            "prefill_ms": 1e3 * statistics.median(prefill for prefill, _ in times),
            "ms_per_token": 1e3 * statistics.median(decode for _, decode in times) / (new_tokens - 1),
            "workers": [{"slice_bytes": size, "peak_rss_bytes": peak} for size, peak in memory.get(name, [])],
        }
        for name, times in runs.items()
    ]


async def _start(stack: AsyncExitStack, model: str, count: int) -> GenerationClient:
    workers = await stack.enter_async_context(EmbeddedWorkers(count, "cpu", None))
    await workers.wait_listening()
    settings = ServeSettings(
        model=ModelSettings(model, dtype="f32", wire="f32"),
        listen=workers.coordinator_address,
        workers=workers.addresses,
        shards=count,
    )
    coordinator = await Coordinator.start(settings, ServedModel.open(settings.model), lambda _: None)
    stack.push_async_callback(coordinator.stop, 0)
    return await stack.enter_async_context(GenerationClient(coordinator.address))


async def _run_mesh(client: GenerationClient, prompt: list[int], new_tokens: int) -> tuple[list[int], float, float]:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt), max_tokens=new_tokens, ignore_eos=True
    )
    ids: list[int] = []
    start = time.perf_counter()
    first = start
    async for response in client.generate(request):
        if response.WhichOneof("event") == "delta":
            first = first if ids else time.perf_counter()
            ids += response.delta.token_ids
    return ids, first - start, time.perf_counter() - first


@torch.inference_mode()
def _run_transformers(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> tuple[list[int], float, float]:
    start = time.perf_counter()
    output = model(torch.tensor([prompt]), use_cache=True)
    ids = [int(output.logits[0, -1].argmax())]
    first = time.perf_counter()
    while len(ids) < new_tokens:
        output = model(torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        ids.append(int(output.logits[0, -1].argmax()))
    return ids, first - start, time.perf_counter() - first


def show(results: list[dict[str, object]]) -> None:
    """Print a line for each system, with ratios to transformers."""
    table = Table("system", "same tokens", "prefill", "a token", "to transformers", "slice MiB", "peak RSS MiB", box=None)
    base = float(str(results[0]["ms_per_token"]))
    for row in results:
        workers = row["workers"]
        sizes = [[f"{worker[key] / MIB:.0f}" for worker in workers] for key in ("slice_bytes", "peak_rss_bytes")]  # type: ignore[attr-defined]
        token_ms = float(str(row["ms_per_token"]))
        table.add_row(
            str(row["system"]),
            "yes" if row["same_tokens"] else "NO",
            f"{row['prefill_ms']:.0f} ms",
            f"{token_ms:.1f} ms",
            f"{token_ms / base:.2f}",
            *(", ".join(size) for size in sizes),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
