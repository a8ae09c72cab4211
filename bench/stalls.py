"""How long callers wait when a worker is killed: with a warm spare, with a cold one, and when its process is started again.

    .venv/bin/python -m bench.stalls models/smollm2-135m-instruct --kills 5

Two shards serve one stream, on unix sockets and without anything between them; in the middle of it a worker is killed, by turns
the one and the other. The pause is the longest between two messages that the caller saw; its parts are what the coordinator
reports of the recovery. Tokens are compared with an undisturbed run's. A restarted worker is a new process: most of its
time is Python importing torch.
"""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests.faults.mesh import Worker, mesh_of
from tests.faults.streams import STREAM_S, Caller, Outcome, Stream, differences
from tests.faults.waiting import wait_until, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.generation_pb2 import MeshRecovery

PROMPT = "1,504,9388,47,1194"
FILES_S = 60.0
"""Longest that a spare may take to have the model's files in memory."""


@dataclass(frozen=True)
class Case:
    """How the mesh comes by another worker."""

    name: str
    spares: int
    flags: tuple[str, ...] = ()
    """Switches of `coordctl serve`, with underscores."""
    restarts: bool = False
    """Whether the killed worker is started again at once."""


CASES = (
    Case("warm spare", 1, ("warm_spares",)),
    Case("spare", 1),
    Case("cold restart", 0, restarts=True),
)


@dataclass(frozen=True)
class Stall:
    """One kill; seconds."""

    pause_s: float
    detect_s: float
    assemble_s: float
    canary_s: float
    replay_s: float


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--kills", type=click.IntRange(min=1), default=4, show_default=True, help="Of each kind.")
@click.option("--new-tokens", type=click.IntRange(min=10), default=64, show_default=True)
@click.option("--dtype", default="bf16", show_default=True)
@click.option("--wire", default="bf16", show_default=True)
def main(model: Path, kills: int, new_tokens: int, dtype: str, wire: str) -> None:
    """Kill workers of a mesh that serves MODEL, and print a table."""
    stream = Stream("stalled", tuple(map(int, PROMPT.split(","))), max_tokens=new_tokens)
    rows = [(case, asyncio.run(measure(case, model.resolve(), stream, kills, {"dtype": dtype, "wire": wire}))) for case in CASES]
    click.echo(markdown(rows))


async def measure(case: Case, model: Path, stream: Stream, kills: int, flags: dict[str, object]) -> list[Stall]:
    """Kill `kills` workers, one after the other, each in the middle of a stream."""
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(mesh_of(model, 2 + case.spares, direct=True))
        settings = {**flags, "round_timeout": 10.0, "max_rows": 512, **dict.fromkeys(case.flags, True)}
        coordinator, caller = await stack.enter_async_context(mesh.coordinator(**settings))
        expected = await caller.generate(stream)
        stalls: list[Stall] = []
        for number in range(kills):
            if "warm_spares" in case.flags:
                await wait_until(
                    "the spare to be warm", lambda: coordinator.program.printed().count("spare is warm") > len(stalls), FILES_S
                )
            victim = (await mesh.serving(caller))[number % 2]
            stalls.append(await _kill(case, caller, stream, expected, victim))
            click.echo(f"{case.name}: {stalls[-1]}", err=True)
            await mesh.mend(caller)
    return stalls


async def _kill(case: Case, caller: Caller, stream: Stream, expected: Outcome, victim: Worker) -> Stall:
    first = victim.program

    def kill(outcome: Outcome) -> None:
        if len(outcome.tokens) >= stream.max_tokens // 2 and first.alive:
            victim.kill()
            if case.restarts:
                victim.start()

    outcome: Outcome = await within(STREAM_S, "a stream whose worker was killed", caller.generate(stream, kill))
    if wrong := differences(stream, outcome, expected):
        raise click.ClickException("; ".join(wrong))
    recovery: MeshRecovery = (await caller.mesh()).recovery
    return Stall(
        outcome.longest_pause_s,
        *(
            nanoseconds / 1e9
            for nanoseconds in (
                recovery.last_detect_ns,
                recovery.last_assemble_ns,
                recovery.last_canary_ns,
                recovery.last_replay_ns,
            )
        ),
    )


def markdown(rows: Sequence[tuple[Case, Sequence[Stall]]]) -> str:
    """Make the table: medians, and the range of the pause."""
    lines = [
        "| the killed worker's place is taken by | kills | pause, s: median [min-max] | detect | load | canary | replay |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, stalls in rows:
        pauses = [stall.pause_s for stall in stalls]
        parts = [
            statistics.median(getattr(stall, part) for stall in stalls)
            for part in ("detect_s", "assemble_s", "canary_s", "replay_s")
        ]
        lines.append(
            f"| {case.name} | {len(stalls)} | {statistics.median(pauses):.2f} [{min(pauses):.2f}-{max(pauses):.2f}] | "
            + " | ".join(f"{part:.2f}" for part in parts)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
