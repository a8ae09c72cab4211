"""How long callers wait when the mesh is cut anew, and how much slower their streams are while the next one loads beside.

    .venv/bin/python -m bench.reshards models/smollm2-135m-instruct --changes 8

Four workers on unix sockets serve two shards and four by turns, and streams run all the time. Before each change the workers that
do not serve are emptied, so that all shards of the next mesh are loaded. Once there is room for it beside the present one, once
the check of workers' memory says that there is none, and the present mesh gives way. The pause is the longest between two
messages that any caller saw when the one mesh took the other's place; tokens are compared with an undisturbed run's. Rates are of
all streams together: in the seconds before the change was asked for, and from then until that pause began.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.stalls import PROMPT
from tests.faults.cuts import wait_cut
from tests.faults.mesh import Mesh, mesh_of
from tests.faults.streams import STREAM_S, Caller, Outcome, Stream
from tests.faults.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHARDS = (2, 4)
NUM_STREAMS = 4
BEFORE_S = 3.0
"""How long rates are taken before each change."""
AFTER_S = 2.0
"""How long streams go on after it."""
COLUMNS = (
    *("the mesh that serves", "shards", "changes", "after, s", "pause, s", "load", "canary", "replay"),
    *("tokens/s", "loading", "ratio", "gap, s"),
)
COORDINATORS = {"beside": "coordinator", "gives way": "tests.faults.no_room"}
"""Modules of coordinators, by what becomes of the mesh that serves."""


@dataclass(frozen=True)
class Change:
    """One change; seconds."""

    num_shards: int
    """Afterwards."""
    took_s: float
    """From the request until the other mesh served."""
    pause_s: float
    load_s: float
    """Of the pause: finding, loading and opening workers."""
    canary_s: float
    replay_s: float
    rate_before: float
    """Tokens a second."""
    rate_during: float
    gap_s: float
    """Longest time without a token of any stream in which the other mesh was loaded."""


class Arrivals:
    """When tokens came, of all streams."""

    def __init__(self) -> None:
        """None came."""
        self.running: list[Outcome] = []
        """In the order in which they began."""

    def take(self, outcome: Outcome) -> None:
        """Follow a stream that begins."""
        self.running.append(outcome)

    def rate(self, since_s: float, until_s: float) -> float:
        """Give tokens a second in a span of `time.monotonic`."""
        count = sum(since_s <= arrived_s < until_s for outcome in self.running for arrived_s in outcome.arrived_s[1:])
        return count / (until_s - since_s)

    def gap(self, since_s: float, until_s: float) -> float:
        """Give the longest time without a token of any stream in a span."""
        inside = (one for outcome in self.running for one in outcome.arrived_s if since_s < one < until_s)
        moments = [since_s, *sorted(inside), until_s]
        return max(later - earlier for earlier, later in itertools.pairwise(moments))

    def pause(self, around_s: float) -> tuple[float, float]:
        """Give begin and end of the longest pause around a moment."""
        pauses = [
            (earlier, later)
            for outcome in self.running
            for earlier, later in itertools.pairwise(outcome.arrived_s)
            if earlier <= around_s < later
        ]
        return max(pauses, key=lambda pause: pause[1] - pause[0])


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--changes", type=click.IntRange(min=2), default=8, show_default=True, help="Of each kind, there and back.")
@click.option("--new-tokens", type=click.IntRange(min=10), default=300, show_default=True)
@click.option("--dtype", default="bf16", show_default=True)
@click.option("--wire", default="bf16", show_default=True)
def main(model: Path, changes: int, new_tokens: int, dtype: str, wire: str) -> None:
    """Cut the mesh that serves MODEL anew, again and again, and print a table."""
    streams = [Stream(f"cut-{n}", (*map(int, PROMPT.split(",")), 100 + n), max_tokens=new_tokens) for n in range(NUM_STREAMS)]
    rows = [
        (name, asyncio.run(measure(name, model.resolve(), streams, changes, {"dtype": dtype, "wire": wire})))
        for name in COORDINATORS
    ]
    click.echo(markdown(rows))


async def measure(name: str, model: Path, streams: list[Stream], changes: int, flags: dict[str, object]) -> list[Change]:
    """Change the number of shards `changes` times."""
    settings = {**flags, "round_timeout": 10.0, "max_rows": 512}
    async with mesh_of(model, max(SHARDS), direct=True) as mesh, mesh.coordinator(module=COORDINATORS[name], **settings) as found:
        _, caller = found
        expected = await caller.generate_all(streams)
        done: list[Change] = []
        for number in range(changes):
            done.append(await _change(mesh, caller, streams, expected, SHARDS[(number + 1) % 2]))
            click.echo(f"{name}: {done[-1]}", err=True)
    return done


async def _change(mesh: Mesh, caller: Caller, streams: list[Stream], expected: dict[str, Outcome], num_shards: int) -> Change:
    serving = await mesh.serving(caller)
    for worker in mesh.workers:
        if worker not in serving:
            await worker.release()
    arrivals = Arrivals()
    taken: set[int] = set()

    def note(outcome: Outcome) -> None:
        if id(outcome) not in taken:
            taken.add(id(outcome))
            arrivals.take(outcome)

    running = asyncio.create_task(caller.generate_all(streams, note))
    await wait_until("all streams to run", lambda: len(taken) == len(streams), STREAM_S)
    await asyncio.sleep(BEFORE_S)
    asked_s = time.monotonic()
    await caller.reshard(num_shards)
    await wait_cut(caller, num_shards)
    served_s = time.monotonic()
    await asyncio.sleep(AFTER_S)
    if running.done():
        raise click.ClickException("the streams ended before the mesh had changed: say more --new-tokens")
    running.cancel()
    await asyncio.wait([running])
    _check(arrivals.running, streams, expected)
    began_s, ended_s = arrivals.pause(served_s)
    last = (await caller.mesh()).recovery
    return Change(
        num_shards,
        served_s - asked_s,
        ended_s - began_s,
        *(nanoseconds / 1e9 for nanoseconds in (last.last_assemble_ns, last.last_canary_ns, last.last_replay_ns)),
        arrivals.rate(asked_s - BEFORE_S, asked_s),
        arrivals.rate(asked_s, began_s),
        arrivals.gap(asked_s, began_s),
    )


def _check(found: Sequence[Outcome], streams: Sequence[Stream], expected: dict[str, Outcome]) -> None:
    """Compare streams, taken one after the other and cut short, with undisturbed ones."""
    for stream, outcome in zip(streams, found, strict=True):
        if outcome.disorder or outcome.tokens != expected[stream.name].tokens[: len(outcome.tokens)]:
            raise click.ClickException(f"{stream.name}: {outcome} is not how {expected[stream.name].tokens} begins")


def markdown(rows: Sequence[tuple[str, Sequence[Change]]]) -> str:
    """Make the table: medians, and ranges."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    for name, changes in rows:
        for num_shards in reversed(SHARDS):
            of = [change for change in changes if change.num_shards == num_shards]
            (before,) = {*SHARDS} - {num_shards}
            parts = [
                _range(change.took_s for change in of),
                _range(change.pause_s for change in of),
                *(
                    f"{statistics.median(getattr(change, part) for change in of):.2f}"
                    for part in ("load_s", "canary_s", "replay_s")
                ),
                f"{statistics.median(change.rate_before for change in of):.1f}",
            ]
            parts += (
                [
                    f"{statistics.median(change.rate_during for change in of):.1f}",
                    _range(change.rate_during / change.rate_before for change in of),
                    _range(change.gap_s for change in of),
                ]
                if name == "beside"
                else ["-", "-", "-"]
            )
            lines.append(f"| {name} | {before} to {num_shards} | {len(of)} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]"


if __name__ == "__main__":
    main()
