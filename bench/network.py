"""Meshes over networks of some delay and rate, measured, beside what the formula of `bench/model.py` says of them.

    .venv/bin/python -m bench.network models/smollm2-135m-instruct --output network

Makes the network itself (`bench/namespaces.py`; needs root), runs `shardworker serve` in one namespace each and `coordctl bench
--workers` in another, and leaves nothing behind. For each number of workers the first case, bf16 over a network without delay or
limit, gives the formula its constants; all others are predicted by it. Round-trip times are measured in the run: the shortest
time in which the kernel opens a TCP connection. Writes OUTPUT.json (all runs as they were) and OUTPUT.md.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.model import Mesh, calibrate, decode_work, step_s
from bench.model import Network as Link
from bench.namespaces import ROOT, Network, Process, missing
from coordinator.config import DTYPES, QUANTIZATIONS, WIRES
from coordinator.models.config import read_config
from coordinator.models.registry import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PORT = 7000
START_S = 120.0
STOP_S = 10.0
RUN_S = 300.0
"""Longest that a run of a case may take."""

_ROUND_TRIP = """
import socket, sys, time
times = []
for _ in range(15):
    start = time.perf_counter()
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
    times.append(time.perf_counter() - start)
    time.sleep(0.005)
print(min(times))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A mesh and its network."""

    workers: int
    wire: str
    rtt_ms: float
    mbit: float
    """Of each port; 0 for no limit."""

    @property
    def bits_per_s(self) -> float | None:
        """Of each port; None for no limit."""
        return self.mbit * 1e6 or None

    @property
    def baseline(self) -> Case:
        """The case which the formula's constants come from."""
        return Case(self.workers, "bf16", 0, 0)


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured of a case."""

    case: Case
    rtt_s: float
    report: dict[str, Any]


@click.command()
@click.argument("model")
@click.option("--load-format", type=click.Choice(["auto", "random"]), default="auto", show_default=True)
@click.option("--quantize", type=click.Choice(list(QUANTIZATIONS)), default="none", show_default=True)
@click.option("--workers", default="1,2,4", show_default=True, help="Mesh sizes; each worker computes with one thread.")
@click.option("--wires", default="f32,bf16,int8", show_default=True, help="Compared over each of the rates.")
@click.option("--rtts-ms", default="1,5,20", show_default=True, help="Delays without a limit of the rate.")
@click.option("--rates-mbit", default="1000,100", show_default=True, help="Limits without a delay.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Within a run.")
@click.option("--passes", type=click.IntRange(min=1), default=1, show_default=True, help="Through all cases, in turns.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("network"), show_default=True, help="Without a suffix.")
def main(**flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Measure MODEL over several networks, and compare with the formula."""
    if reason := missing():
        sys.exit(f"bench.network: {reason}")
    # So that what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cases = choose_cases(flags)
    runs: list[Run] = []
    with meshes(max(case.workers for case in cases)) as network:
        for number, case in product(range(flags["passes"]), cases):
            click.echo(f"pass {number + 1} of {flags['passes']}: {case}", err=True)
            runs.append(run_case(network, case, flags))
            # After each run: what was measured stays, whatever comes.
            flags["output"].with_suffix(".json").write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    table = markdown(runs)
    flags["output"].with_suffix(".md").write_text(table)
    click.echo(table)


def choose_cases(flags: dict[str, Any]) -> list[Case]:
    """Choose what is run: each delay with each size in bf16, each rate with each wire and the middle size; baselines first."""
    sizes = [int(size) for size in flags["workers"].split(",")]
    rtts, rates = ([float(part) for part in flags[name].split(",") if part] for name in ("rtts_ms", "rates_mbit"))
    middle = sizes[len(sizes) // 2]
    cases = [Case(size, "bf16", rtt, 0) for size, rtt in product(sizes, [0, *rtts])]
    cases += [Case(middle, wire, 0, rate) for rate, wire in product(rates, flags["wires"].split(","))]
    return sorted(dict.fromkeys(cases), key=lambda case: case != case.baseline)


@contextmanager
def meshes(num_workers: int) -> Iterator[Network]:
    """Run a worker in each node of a network but node 0.

    Raises:
        OSError: the network cannot be made, or a worker does not listen.

    """
    with ExitStack() as stack:
        network = stack.enter_context(Network(num_workers + 1))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shardmesh-"))
        serve = [sys.executable, "-m", "shardworker", "serve", "--insecure", "--threads", "1", "--device", "cpu"]
        # With this flag it ends, and removes the folder, when its standard input does.
        serve += ["--log-level", "error", "--embedded-in", folder]
        workers = [
            stack.enter_context(Process(network.inside(node, [*serve, "--listen", address(node)])))
            for node in range(1, num_workers + 1)
        ]
        for worker in workers:
            if not worker.wait_line(START_S).startswith("listening on "):
                raise OSError("a worker does not listen: what it said is above")
        yield network


def address(node: int) -> str:
    """Where the worker of a node listens."""
    return f"{Network.address(node)}:{PORT}"


def run_case(network: Network, case: Case, flags: dict[str, Any]) -> Run:
    """Shape the network, and run `coordctl bench` once; its mistakes are ours."""
    network.shape(case.rtt_ms / 1e3, case.bits_per_s)
    # The first packets make nodes learn each other's addresses.
    found = [_output(network, ["-c", _ROUND_TRIP, *address(1).split(":")], START_S) for _ in range(2)]
    command = ["-m", "coordinator", "bench", "--json", "--insecure", "--model", flags["model"], "--wire", case.wire]
    command += ["--workers", ",".join(address(node) for node in range(1, case.workers + 1)), "--kv-tokens", "4096"]
    for name in ("load_format", "quantize", "prompt_tokens", "new_tokens", "repeats"):
        command += ["--" + name.replace("_", "-"), str(flags[name])]
    return Run(case, float(found[1]), json.loads(_output(network, command, RUN_S)))


def _output(network: Network, arguments: Sequence[str], deadline_s: float) -> str:
    """Standard output of a Python process in node 0; its failure is ours."""
    command = network.inside(0, [sys.executable, *arguments])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: S603  # ourselves
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        sys.exit(f"bench.network: {' '.join(arguments[:3])} took longer than {deadline_s:g} s")
    finally:
        _end(process)
    if process.returncode:
        sys.exit(process.returncode)
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that may run still: kindly, so that it removes what it made, but soon."""
    process.terminate()
    try:
        process.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def markdown(runs: Sequence[Run]) -> str:
    """Write what was measured beside what the formula says: medians over passes."""
    titles = ("workers", "wire", "RTT", "Mbit/s", "a token", "model", "off by", "prompt", "model", "off by")
    lines = ["| " + " | ".join(titles) + " |", "| ---: | --- |" + " ---: |" * (len(titles) - 2)]
    by_case = {case: [run for run in runs if run.case == case] for case in dict.fromkeys(run.case for run in runs)}
    for case, found in by_case.items():
        rtt_s, token_s, prompt_s = (statistics.median(values) for values in zip(*map(_measured, found), strict=True))
        cells = [str(case.workers), case.wire, f"{rtt_s * 1e3:.2f} ms", f"{case.mbit:g}" if case.mbit else "-"]
        for measured, said in zip((token_s, prompt_s), predict(case, rtt_s, by_case[case.baseline]), strict=True):
            cells += [f"{measured * 1e3:.1f} ms", f"{said * 1e3:.1f} ms", f"{100 * (said / measured - 1):+.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    baselines = [run.report for case, same in by_case.items() if case == case.baseline for run in same]
    return "\n".join(lines) + f"\n\n{_footnote(baselines)}\n"


def _footnote(baselines: Sequence[dict[str, Any]]) -> str:
    costs = calibrate(baselines, [read_mesh(report, "bf16") for report in baselines])
    report, machine = baselines[0], baselines[0]["machine"]
    work = f"prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new ones"
    rounds = f"{costs.round_s * 1e6:.0f} us a round, {costs.shard_s * 1e6:.0f} us more for each worker"
    rates = f"reads {costs.bytes_per_s / 1e9:.1f} GB/s and makes {costs.operations_per_s / 1e9:.0f} G operations/s"
    return "\n".join(
        (
            f"{report['model']}, {report['dtype']}, {report['quantization']} quantization; {work}.",
            f"{machine['cpu']}, {machine['cores']} cores for everything.",
            "The first line of each size gave the model its constants, the others are predicted. All sizes together give",
            f"{rounds} and {costs.byte_s * 1e9:.1f} ns for each byte; a worker {rates}.",
        )
    )


def _measured(run: Run) -> tuple[float, float, float]:
    """Round trip, time of a token and time of a prompt, seconds."""
    decode, prefill = (run.report[part]["tokens_per_s"]["median"] for part in ("decode", "prefill"))
    return run.rtt_s, 1 / decode, run.report["prompt_tokens"] / prefill


def predict(case: Case, rtt_s: float, baseline: Sequence[Run]) -> tuple[float, float]:
    """Say how long a token and a prompt take, seconds; only what the case adds to the baseline's network is the formula's."""
    reports = [run.report for run in baseline]
    costs = calibrate(reports, [read_mesh(report, "bf16") for report in reports])
    mesh, prompt_tokens = read_mesh(reports[0], case.wire), reports[0]["prompt_tokens"]
    base_s = min(run.rtt_s for run in baseline)
    link = Link(max(0.0, rtt_s - base_s), case.bits_per_s / 8 if case.bits_per_s else math.inf)
    token = decode_work(mesh, 1, prompt_tokens, reports[0]["new_tokens"])
    return step_s(token, costs, link), sum(step_s(step, costs, link) for step in mesh.prefill(prompt_tokens))


def read_mesh(report: dict[str, Any], wire: str) -> Mesh:
    """Cut the model of a report as it was cut, for a wire."""
    spec = describe(read_config(Path(report["model"])))
    mesh = Mesh.cut(
        spec,
        report["shards"],
        dtype=DTYPES[report["dtype"]],
        quantization=QUANTIZATIONS[report["quantization"]],
        wire=WIRES[report["wire"]],
    )
    return replace(mesh, wire=WIRES[wire])


if __name__ == "__main__":
    main()
