"""A bounded random soak: random streams, random faults, everything compared.

    python -m tests.faults.soak --minutes 10 --seed 1

Round r of a seed is always the same: which streams run, which workers fail, how, and in which step of theirs, and into how many
shards the mesh is cut anew, if it is. Before the first round every stream runs undisturbed; that is what it must give ever after.
At the end the resident set of each process, without its weights, is compared with what it was once the process had done some
rounds. Exit code 0: nothing differed, and nothing grew by more than 5 %.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests.faults.campaign import ACTIONS
from tests.faults.cuts import check_tidy, wait_cut
from tests.faults.faults import FAULTS, LIES
from tests.faults.mesh import Coordinator, Mesh, mesh_of
from tests.faults.proxy import Moment, When
from tests.faults.sizes import Sizes
from tests.faults.streams import STREAM_S, Caller, Outcome, Stream, differences
from tests.faults.waiting import within
from tests.tiny import add_tokenizer, make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NUM_STREAMS = 24
NUM_WORKERS = 6
"""Up to four shards, and two spares."""
NUMBERS = (1, 2, 3, 4)
"""Of shards."""
MAX_MESSAGES = 200
"""After so many of a round, or at its end, the mesh is cut anew, if it is."""
MAX_STEP = 40
GROWTH = 0.05
"""Of a resident set, at most."""


@dataclass(frozen=True)
class Injury:
    """A fault that waits for its moment."""

    fault: str
    worker: int
    moment: Moment
    sprung: asyncio.Event

    def __str__(self) -> str:
        """Say it, for people."""
        return f"{self.fault} worker {self.worker} {self.moment}{'' if self.sprung.is_set() else ' (never came)'}"


@dataclass
class Soak:
    """A soak, and what it did."""

    mesh: Mesh
    """With two shards at first, and as many spares as may fail in a round: two."""
    caller: Caller
    """Of the coordinator that serves it."""
    seed: int
    numbers: tuple[int, ...]
    """Of shards, which the mesh may be cut into."""
    say: Callable[[str], None]
    """Told of each round."""
    rounds: int = 0
    streams: int = 0
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    """Faults whose moment never came, because the streams were over."""
    reshards: int = 0
    worst_pause_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    async def run(self, seconds: float, most_rounds: float, after_round: Callable[[], Awaitable[None]]) -> None:
        """Do rounds until time is up, as many as there may be are done, or something differs."""
        streams = random_streams(self.seed)
        expected = await self.caller.generate_all(streams)
        assert all(outcome.usage for outcome in expected.values()), "the undisturbed run failed"
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and self.rounds < most_rounds and not self.wrong:
            await self._round(streams, expected)
            await after_round()

    async def _round(self, streams: list[Stream], expected: dict[str, Outcome]) -> None:
        chosen = random.Random(f"round {self.seed} {self.rounds}")  # noqa: S311  # for variety
        running = chosen.sample(streams, chosen.randrange(1, 13))
        injuries = await self._prepare(chosen)
        wish = chosen.choice((0, *self.numbers))
        started_s = time.monotonic()
        work = self._generate(running, wish, chosen.randrange(MAX_MESSAGES))
        outcomes: dict[str, Outcome] = await within(STREAM_S + 10, "a round of the soak", work)
        took_s = time.monotonic() - started_s
        self.rounds += 1
        self.streams += len(running)
        self.tokens += sum(len(outcome.tokens) for outcome in outcomes.values())
        self.faults.update(injury.fault for injury in injuries if injury.sprung.is_set())
        self.missed += sum(not injury.sprung.is_set() for injury in injuries)
        pause_s = max(outcome.longest_pause_s for outcome in outcomes.values())
        self.worst_pause_s = max(self.worst_pause_s, pause_s)
        what = "; ".join([*map(str, injuries), *([f"{wish} shards"] if wish else [])]) or "no fault"
        self.say(f"round {self.rounds}: {len(running)} streams, {what}: {took_s:.1f} s, longest pause {pause_s:.2f} s")
        wrong = [text for stream in running for text in differences(stream, outcomes[stream.name], expected[stream.name])]
        for text in wrong:
            self.say(f"  WRONG {text}")
        self.wrong += wrong
        await self.mesh.mend(self.caller)
        if wish:
            self.reshards += 1
            await wait_cut(self.caller, wish)
        await check_tidy(self.mesh, self.caller)

    async def _generate(self, streams: list[Stream], wish: int, messages: int) -> dict[str, Outcome]:
        """Run streams, and ask for so many shards, unless it is 0, after so many messages."""
        asking: list[asyncio.Task[None]] = []
        left = messages

        def note(_: Outcome) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                asking.append(asyncio.create_task(self.caller.reshard(wish)))

        outcomes = await self.caller.generate_all(streams, note if wish else lambda _: None)
        if wish and not asking:
            await self.caller.reshard(wish)
        await asyncio.gather(*asking)
        return outcomes

    async def _prepare(self, chosen: random.Random) -> list[Injury]:
        """Lay the traps of a round: for none, one or two of the serving workers."""
        serving = await self.mesh.serving(self.caller)
        self.mesh.count_from_here()
        injuries = []
        for shard in chosen.sample(range(len(serving)), min(len(serving), chosen.choice((0, 1, 1, 1, 2)))):
            fault = chosen.choice(list(FAULTS))
            when = When.AFTER if fault in LIES else chosen.choice(list(When))
            moment = Moment(chosen.randrange(MAX_STEP), *chosen.choice(ACTIONS), when)
            worker = serving[shard]
            sprung = worker.proxy.at(moment, partial(FAULTS[fault], worker))
            injuries.append(Injury(fault, worker.number, moment, sprung))
        return injuries


def random_streams(seed: int) -> list[Stream]:
    """Give streams of all kinds."""
    chosen = random.Random(f"streams {seed}")  # noqa: S311  # for variety
    streams = []
    for number in range(NUM_STREAMS):
        length = chosen.choice((1, 2, 5, 17, 60, chosen.randrange(1, 420)))
        sampling: dict[str, float] = {}
        if chosen.random() < 0.6:
            sampling = {"temperature": chosen.choice((0.5, 0.9, 1.4)), "seed": chosen.randrange(2**32)}
            sampling |= chosen.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"repetition_penalty": 1.2}))
        prompt = tuple(chosen.randrange(3, 500) for _ in range(length))
        streams.append(Stream(f"soak-{number}", prompt, max_tokens=chosen.randrange(1, 65), sampling=sampling))
    return streams


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=5.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed does the same rounds.")
@click.option("--rounds", "most_rounds", type=click.IntRange(min=1), help="No more rounds than this.")
def main(minutes: float, seed: int, most_rounds: int | None) -> None:
    """Soak, and say what was done."""
    sys.exit(asyncio.run(_main(minutes, seed, most_rounds or float("inf"))))


async def _main(minutes: float, seed: int, most_rounds: float) -> int:
    with tempfile.TemporaryDirectory(prefix="shardmesh-soak-") as directory:
        model = Path(directory) / "model"
        make_checkpoint("glm4_moe", model)
        add_tokenizer(model)
        async with mesh_of(model, NUM_WORKERS) as mesh, mesh.coordinator() as (coordinator, caller):
            soak, sizes = Soak(mesh, caller, seed, NUMBERS, click.echo), Sizes()
            await soak.run(60 * minutes, most_rounds, partial(_note_sizes, sizes, mesh, coordinator, caller))
            recovery = (await caller.mesh()).recovery
    click.echo(
        f"seed {seed}: {soak.rounds} rounds, {soak.streams} streams, {soak.tokens} tokens compared, {len(soak.wrong)} wrong\n"
        f"faults {dict(soak.faults)}, and {soak.missed} whose moment never came; "
        f"{soak.reshards} numbers of shards asked for; longest pause {soak.worst_pause_s:.2f} s"
    )
    click.echo(
        f"the coordinator counts {recovery.recoveries} recoveries, {recovery.reshards} times that the mesh was cut anew, "
        f"and failures {dict(recovery.failures)}"
    )
    for size in sizes.settled():
        click.echo(f"RSS of {size}")
    return int(bool(soak.wrong) or any(size.growth > GROWTH for size in sizes.settled()))


async def _note_sizes(sizes: Sizes, mesh: Mesh, coordinator: Coordinator, caller: Caller) -> None:
    """Take the sizes of who is at work; a spare grows when it loads."""
    sizes.note("coordinator", coordinator.program)
    for worker in await mesh.serving(caller):
        sizes.note(f"worker {worker.number}", worker.program, (await worker.describe()).weights_bytes)


if __name__ == "__main__":
    main()
