"""A benchmark: what is compared takes turns, and everything is repeated.

A repeat is one stream, then, if asked for, several at once, then the echo's rounds; a first one warms everything up and does
not count. The memory's rate is read just before and just after the repeats, while the mesh is idle. A shared machine is as
slow as its neighbours allow, so only numbers of one run belong beside each other. Beside workers of other machines there is
neither an echo nor a rate of memory: both would be measured here.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.bench.load import Load, Prompts, Workload, run_load
from coordinator.bench.machine import describe_machine, peak_rss_bytes
from coordinator.bench.mesh import RecordedMesh, recorded_mesh
from coordinator.bench.overhead import compare_overheads, echo_servers, token_orders
from coordinator.bench.report import Report, Streams, WorkerUse
from coordinator.bench.roofline import Roofline, measure_memory, token_bytes
from coordinator.bench.statistics import (
    DecodeWindow,
    StepCost,
    decode_window,
    overheads_us,
    prefill_window,
    step_cost,
    worker_compute_s,
)
from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.bench.mesh import MeshSettings
    from coordinator.bench.overhead import Echo


@dataclass(slots=True)
class Samples:
    """What repeats gave; loads and windows by number of streams, overheads of the echo by action."""

    loads: dict[int, list[Load]] = field(default_factory=lambda: defaultdict(list))
    windows: dict[int, list[DecodeWindow]] = field(default_factory=lambda: defaultdict(list))
    prompts: list[StepCost] = field(default_factory=list)
    """Of one stream's."""
    echo: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def streams(self, count: int) -> Streams:
        """Sum up the repeats of so many streams."""
        cost = StepCost.median([step_cost(window) for window in self.windows[count]])
        return Streams(count, tuple(self.loads[count]), cost)


async def measure(settings: MeshSettings, work: Workload, on_progress: Callable[[str], None]) -> Report:
    """Start a mesh, measure it, end it.

    Args:
        settings: of the mesh.
        work: to be done.
        on_progress: told what is being done, in a few words, once the mesh is loaded.

    Raises:
        MeshError: the model, the workload or a process is no good.

    """
    async with (
        recorded_mesh(settings, work.prompt_tokens, work.new_tokens) as mesh,
        nullcontext() if settings.workers else echo_servers(mesh.folder, settings.shards) as echo,
    ):
        runner = Runner(mesh, echo, Prompts(mesh.spec.vocabulary), work, on_progress)
        await runner.repeat(Samples(), "warming up")
        before = await runner.read_memory()
        samples = Samples()
        for number in range(work.repeats):
            await runner.repeat(samples, f"repeat {number + 1} of {work.repeats}")
        after = await runner.read_memory()
        return await _report(mesh, settings, work, samples, (before, after) if before and after else None)


@dataclass(frozen=True, slots=True)
class Runner:
    """Does the work on a mesh and beside it."""

    mesh: RecordedMesh
    echo: Echo | None
    """None where the workers are not this machine's own."""
    prompts: Prompts
    work: Workload
    on_progress: Callable[[str], None]

    async def repeat(self, samples: Samples, title: str) -> None:
        """Do everything once."""
        for streams in sorted({1, self.work.concurrency}):
            self.on_progress(f"{title}: {streams} streams" if streams > 1 else f"{title}: one stream")
            load, window, prompt = await self._run(streams)
            if streams == 1:
                samples.prompts.append(step_cost(prompt))
            samples.loads[streams].append(load)
            samples.windows[streams].append(window)
        if self.echo is None:
            return
        self.on_progress(f"{title}: echo")
        overheads = await self.echo.measure(token_orders(samples.windows[1][-1].rounds))
        for action, values in overheads.items():
            samples.echo[action] += values

    async def read_memory(self) -> float | None:
        """Measure the memory's rate, bytes per second; none where workers compute elsewhere."""
        workers = [worker for worker in (await self.mesh.client.mesh()).workers if worker.serving]
        if self.echo is None or any(worker.device != "cpu" for worker in workers):
            return None
        self.on_progress("reading memory")
        return await measure_memory(len(workers), workers[0].num_threads)

    async def _run(self, streams: int) -> tuple[Load, DecodeWindow, DecodeWindow]:
        """Run so many streams; the load, and the steps of decoding and of prefill."""
        self.mesh.take_rounds()
        prompts = [self.prompts.draw(self.work.prompt_tokens) for _ in range(streams)]
        load = await run_load(self.mesh.client, prompts, self.work.new_tokens)
        rounds = self.mesh.take_rounds()
        window = decode_window(rounds, streams)
        if window is None:
            raise InvalidArgument(
                f"--new-tokens {self.work.new_tokens}: at no step did all {streams} streams decode; ask for more of them, "
                "for shorter prompts, or for a larger --kv-tokens"
            )
        return load, window, prefill_window(rounds, window)


async def _report(
    mesh: RecordedMesh, settings: MeshSettings, work: Workload, samples: Samples, memory: tuple[float, float] | None
) -> Report:
    status, windows = await mesh.client.mesh(), samples.windows[1]
    mesh_overheads = overheads_us(one for window in windows for one in window.rounds)
    everything, by_action = compare_overheads(mesh_overheads, samples.echo)
    times = [worker_compute_s(window) for window in windows]
    compute_s = tuple(statistics.median(worker) for worker in zip(*times, strict=True))
    # On average half of the new tokens are in the KV cache already.
    read = token_bytes(mesh.spec, mesh.plan.shards, work.prompt_tokens + work.new_tokens / 2)
    workers = sorted((worker for worker in status.workers if worker.serving), key=lambda worker: worker.shard)
    return Report(
        settings=settings.model,
        model=await mesh.client.model(),
        device=workers[0].device,
        kernels=", ".join(sorted({worker.kernels for worker in workers})),
        threads=workers[0].num_threads,
        load_s=mesh.load_s,
        work=work,
        single=samples.streams(1),
        prompt=StepCost.median(samples.prompts),
        concurrent=samples.streams(work.concurrency) if work.concurrency > 1 else None,
        overhead=everything,
        overhead_by_action=by_action,
        roofline=Roofline(*memory, read, compute_s) if memory else None,
        workers=tuple(
            WorkerUse(worker.weights_bytes, worker.kv_bytes, worker.peak_rss_bytes, seconds)
            for worker, seconds in zip(workers, compute_s, strict=True)
        ),
        coordinator_peak_rss_bytes=peak_rss_bytes(),
        preemptions=status.load.preemptions,
        machine=describe_machine(),
    )
