"""What a benchmark found: one JSON object, or tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from coordinator.bench.statistics import Spread
from coordinator.commands.console import show_bytes
from coordinator.config import DTYPES

if TYPE_CHECKING:
    from rich.console import Console

    from coordinator.bench.load import Load, Workload
    from coordinator.bench.overhead import OverheadComparison
    from coordinator.bench.roofline import Roofline
    from coordinator.bench.statistics import StepCost
    from coordinator.config import ModelSettings
    from protos.generation_pb2 import GetModelResponse


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What a worker took."""

    slice_bytes: int
    kv_bytes: int
    peak_rss_bytes: int
    compute_s: float
    """Of a decoded token of one stream, median over the repeats."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams that ran together, again and again."""

    count: int
    loads: tuple[Load, ...]
    cost: StepCost
    """Of a step, which gives each stream a token; medians over the repeats."""

    @property
    def prefill(self) -> Spread:
        """Prompt tokens of all streams a second."""
        return Spread.of([load.prefill_per_s for load in self.loads])

    @property
    def decode(self) -> Spread:
        """Generated tokens of all streams a second, while all of them decode."""
        return Spread.of([load.decode_per_s for load in self.loads])

    @property
    def total(self) -> Spread:
        """Generated tokens of all streams a second, prefill included."""
        return Spread.of([load.total_per_s for load in self.loads])


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. Tuples of workers are in shard order."""

    settings: ModelSettings
    model: GetModelResponse
    device: str
    kernels: str
    """What computes on the workers."""
    threads: int
    """Of each worker."""
    load_s: float
    work: Workload
    single: Streams
    prompt: StepCost
    """Of one stream's whole prompt; medians over the repeats."""
    concurrent: Streams | None
    """None unless more than one stream was asked for."""
    overhead: OverheadComparison
    overhead_by_action: dict[str, OverheadComparison]
    roofline: Roofline | None
    """None where workers compute on another device than the host's."""
    workers: tuple[WorkerUse, ...]
    coordinator_peak_rss_bytes: int
    preemptions: int
    machine: dict[str, object]

    @property
    def dtype(self) -> str:
        """As on the command line."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.model.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Make the object of `--json`; units are in the names."""
        return {
            "model": self.settings.model,
            "family": self.model.family,
            "dtype": self.dtype,
            "quantization": self.settings.quantization,
            "wire": self.settings.wire,
            "load_format": "random" if self.settings.random_weights else "auto",
            "shards": len(self.workers),
            "threads": self.threads,
            "device": self.device,
            "kernels": self.kernels,
            "prompt_tokens": self.work.prompt_tokens,
            "new_tokens": self.work.new_tokens,
            "repeats": self.work.repeats,
            "load_s": self.load_s,
            "prefill": {"tokens_per_s": self.single.prefill.as_dict()},
            "decode": {"tokens_per_s": self.single.decode.as_dict()},
            "per_token": self.single.cost.as_dict(),
            "per_prompt": self.prompt.as_dict(),
            "concurrent": self._concurrent_as_dict(),
            "round": {
                **self.overhead.as_dict(),
                "actions": {action: found.as_dict() for action, found in self.overhead_by_action.items()},
            },
            "roofline": self.roofline.as_dict() if self.roofline else None,
            "workers": [
                {
                    "slice_bytes": worker.slice_bytes,
                    "kv_bytes": worker.kv_bytes,
                    "peak_rss_bytes": worker.peak_rss_bytes,
                    "compute_ms_per_token": worker.compute_s * 1e3,
                }
                for worker in self.workers
            ],
            "coordinator": {"peak_rss_bytes": self.coordinator_peak_rss_bytes},
            "preemptions": self.preemptions,
            "machine": self.machine,
        }

    def print(self, console: Console) -> None:
        """Print tables, llama-bench's first."""
        machine, memory = self.machine, show_bytes(int(str(self.machine["memory_bytes"])))
        quantized = "" if self.settings.quantization == "none" else f", {self.settings.quantization} weights"
        mesh = f"{self.settings.wire} wire, {len(self.workers)} workers x {self.threads} threads on {self.device}, {self.kernels}"
        lines = (
            f"{self.settings.model}: {self.model.family}, {self.dtype}{quantized}, {mesh}",
            f"{machine['cpu']}, {machine['cores']} cores, {memory}, torch {machine['torch']}",
        )
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        for table in (self._speeds(), self._costs(), self._rounds(), self._processes()):
            console.print()
            console.print(table)
        if self.roofline:
            rate = f"{self.roofline.bytes_per_s / 1e9:.1f} GB/s"
            console.print(f"\nThe memory's rate was {rate}, read by as many processes and threads at once.", highlight=False)
        if self.preemptions:
            console.print(
                f"{self.preemptions} preemptions: the KV cache is too small for these streams, ask for more --kv-tokens."
            )

    def _concurrent_as_dict(self) -> dict[str, Any] | None:
        if self.concurrent is None:
            return None
        spreads = {"prefill": self.concurrent.prefill, "decode": self.concurrent.decode, "total": self.concurrent.total}
        return {
            "streams": self.concurrent.count,
            **{name: {"tokens_per_s": spread.as_dict()} for name, spread in spreads.items()},
            "decode_ratio": self.concurrent.decode.median / self.single.decode.median,
            "per_step": self.concurrent.cost.as_dict(),
        }

    def _speeds(self) -> Table:
        table = _table("test", "tokens/s: min", "median", "max")
        prefill, decode = f"pp{self.work.prompt_tokens}", f"tg{self.work.new_tokens}"
        rows = {prefill: self.single.prefill, decode: self.single.decode}
        if self.concurrent:
            streams = f"{self.concurrent.count} streams"
            rows[f"{prefill}, {streams}"] = self.concurrent.prefill
            rows[f"{decode}, {streams}"] = self.concurrent.decode
            rows[f"{prefill}+{decode}, {streams}, generated"] = self.concurrent.total
        for name, spread in rows.items():
            table.add_row(name, *(f"{value:.2f}" for value in (spread.min, spread.median, spread.max)))
        return table

    def _costs(self) -> Table:
        parts = ("total", "compute", "wire", "coordinator", "wait")
        table = _table("decode, ms", *parts, "rounds", "sent", "received")
        for streams in filter(None, (self.single, self.concurrent)):
            cost = streams.cost
            times = (cost.total_ms, cost.compute_ms, cost.wire_ms, cost.coordinator_ms, cost.wait_ms)
            sizes = (_size(round(cost.bytes_sent)), _size(round(cost.bytes_received)))
            name = "token" if streams.count == 1 else f"step of {streams.count}"
            table.add_row(name, *(f"{time:.2f}" for time in times), f"{cost.rounds:.4g}", *sizes)
        return table

    def _rounds(self) -> Table:
        table = _table("a round beyond compute, us", "min", "median", "max", "bare gRPC echo", "ratio")
        for name, found in {**self.overhead_by_action, "all": self.overhead}.items():
            own = (f"{value:.0f}" for value in (found.mesh.min, found.mesh.median, found.mesh.max))
            bare = (f"{found.echo.median:.0f}", f"{found.ratio:.2f}") if found.echo else ("-", "-")
            table.add_row(name, *own, *bare)
        return table

    def _processes(self) -> Table:
        table = _table("process", "slice", "KV", "peak RSS", "compute, ms a token", "reads a token", "of memory's rate")
        for number, worker in enumerate(self.workers):
            sizes = map(_size, (worker.slice_bytes, worker.kv_bytes, worker.peak_rss_bytes))
            read = ("-", "-")
            if self.roofline:
                fraction = f"{100 * self.roofline.fractions[number]:.0f}\xa0%"
                read = (_size(round(self.roofline.bytes_per_token[number])), fraction)
            table.add_row(f"worker {number}", *sizes, f"{worker.compute_s * 1e3:.2f}", *read)
        table.add_row("coordinator", "", "", _size(self.coordinator_peak_rss_bytes), "", "", "")
        return table


def _size(num_bytes: int) -> str:
    """Write bytes so that a narrow table does not part number and unit."""
    return show_bytes(num_bytes).replace(" ", "\xa0")


def _table(name: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
