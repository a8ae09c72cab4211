"""Which rows go into the next step. Pure decisions: no torch, no clock, no awaiting.

A step is `{sequence: rows}`: one notion covers decode rows (one row), prompts, chunks of prompts, and the replay of a journal.
Decode rows come first, so that running streams never wait for a long prompt; what is left of the row budget goes to prompts in
order of arrival. When KV pages run out, the youngest sequence gives its pages back and is replayed from its journal later.

A sequence that was in the step when a mesh broke, again and again, is suspected of having broken it. Suspects have steps to
themselves, one after the other, until each has its next token: so a request that breaks meshes is found, and ends alone.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.pages import PagePool
from protos.errors import OutOfMemory, QueueFull

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.sequence import Sequence, SequenceId


SUSPECT_AFTER = 2
"""Strikes after which a sequence has steps to itself."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a mesh was sized for.

    `max_rows` bounds the activations of one step, `max_running` the sequences of one step, `max_waiting` the queue, and
    `num_pages` x `page_tokens` the KV cache in tokens.
    """

    num_pages: int
    page_tokens: int
    max_rows: int = 512
    max_running: int = 64
    max_waiting: int = 256

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_pages * self.page_tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one sequence in a step."""

    sequence: Sequence
    position: int
    num_rows: int
    pages: tuple[int, ...]
    """Pages newly appended to the sequence's table."""
    samples: bool
    """Whether the last row is the sequence's newest token, so that the next one is drawn from it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over rows of several sequences."""

    rows: tuple[Rows, ...]
    released: tuple[SequenceId, ...]
    """Sequences whose KV the workers may drop before this step."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole step."""
        return sum(rows.num_rows for rows in self.rows)


class Scheduler:
    """Waiting -> running -> finished."""

    def __init__(self, limits: Limits) -> None:
        """Start with nothing to do."""
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_tokens)
        self.most_tokens = limits.kv_tokens
        """Of a sequence; fewer than the KV cache holds while a smaller one is about to take its place."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._released: list[SequenceId] = []
        # In order of arrival.
        self._suspects: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            OutOfMemory: it would not fit even if it were alone.
            QueueFull: see `check_room`.

        """
        most = sequence.num_tokens + sequence.request.max_tokens
        if most > self.most_tokens:
            raise OutOfMemory(
                f"prompt and completion need up to {most} tokens of KV cache, the mesh has {self.most_tokens}: "
                "ask for fewer tokens, or serve with a larger --kv-tokens"
            )
        self.check_room()
        self.waiting.append(sequence)

    def check_room(self, num_arriving: int = 0) -> None:
        """Check that one more may wait, beside `num_arriving` that will.

        Raises:
            QueueFull: `max_waiting` sequences wait already, those not counted that could run.

        """
        # Many may come between two steps, with seats free for all of them.
        num_waiting = len(self.waiting) + num_arriving - (self.limits.max_running - len(self.running))
        if num_waiting >= self.limits.max_waiting:
            raise QueueFull(f"{num_waiting} requests are waiting already: retry later")

    def schedule(self) -> Step | None:
        """Decide the next step; None if there is nothing to do.

        Every sequence of the step has its pages afterwards; call `advance` when the workers have done it.
        """
        if self._suspects:
            return self._step([self._alone(self._suspects[0])])
        rows: list[Rows] = []
        budget = self.limits.max_rows
        preempted = False
        # Stable: decode rows first, then prompts, each in order of arrival.
        for sequence in sorted(self.running, key=lambda running: running.num_pending > 1):
            if budget == 0 or (preempted and sequence not in self.running):
                continue
            scheduled, was_preempted = self._extend(sequence, budget, rows)
            preempted |= was_preempted
            if scheduled:
                rows.append(scheduled)
                budget -= scheduled.num_rows
        while budget and self.waiting and not preempted and len(self.running) < self.limits.max_running:
            if (first := self._admit(budget)) is None:
                break
            rows.append(first)
            budget -= first.num_rows
        return self._step(rows) if rows else None

    def advance(self, step: Step, tokens: Mapping[SequenceId, int]) -> None:
        """Record that the workers did `step` and which tokens were drawn; sequences finished meanwhile are passed over."""
        for rows in step.rows:
            sequence = rows.sequence
            if sequence.finished:
                continue
            sequence.num_computed = rows.position + rows.num_rows
            if rows.samples:
                sequence.generated.append(tokens[sequence.id])
                self._acquit(sequence)

    def strike(self, step: Step) -> list[Sequence]:
        """Note that a mesh broke in `step`; give those that had it to themselves as suspects, whom nothing excuses any more.

        Who breaks meshes does so at the same place of its text; who is only there when workers die is struck here and there.
        """
        guilty = []
        for rows in step.rows:
            sequence = rows.sequence
            if sequence.finished:
                continue
            _strike(sequence, range(rows.position, rows.position + rows.num_rows))
            if sequence.strikes > SUSPECT_AFTER + 1:
                guilty.append(sequence)
            elif sequence.strikes >= SUSPECT_AFTER and sequence not in self._suspects:
                self._suspects.append(sequence)
        return guilty

    def take_released(self) -> tuple[SequenceId, ...]:
        """Give the sequences that the workers must forget before their pages are used again; whoever asks tells them."""
        released, self._released = tuple(self._released), []
        return released

    def drop_kv(self, sequence: SequenceId) -> None:
        """Have the workers forget a sequence in the next step, whose pages its owner has given back."""
        self._released.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and free its pages. Idempotent."""
        if sequence.finished:
            return
        sequence.finished = True
        self._acquit(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def rewind(self) -> None:
        """Replay every running sequence from its journal: the workers may hold nothing any more."""
        for sequence in reversed(self.running):
            self._release(sequence)
            self.waiting.appendleft(sequence)
        self.running.clear()

    def resize(self, limits: Limits) -> None:
        """Take what another mesh was sized for, whose workers hold nothing of any sequence.

        Raises:
            ValueError: sequences are running: `rewind` first.

        """
        if self.running:
            raise ValueError(f"{len(self.running)} sequences have pages of another mesh")
        self.limits, self.most_tokens = limits, limits.kv_tokens
        self.pool = PagePool(limits.num_pages, limits.page_tokens)
        self._released = []

    @property
    def needed_tokens(self) -> int:
        """KV cache that the longest of all sequences may come to need, tokens; 0 without any."""
        every = (*self.running, *self.waiting)
        return max((len(sequence.request.prompt) + sequence.request.max_tokens for sequence in every), default=0)

    def _acquit(self, sequence: Sequence) -> None:
        if sequence.strikes:
            sequence.strikes = 0
            if sequence in self._suspects:
                self._suspects.remove(sequence)

    def _step(self, rows: list[Rows]) -> Step:
        return Step(tuple(rows), self.take_released())

    def _alone(self, suspect: Sequence) -> Rows:
        """Give a suspect the whole step, and the pages of whoever is in its way."""
        if suspect in self.waiting:
            self.waiting.remove(suspect)
            insort(self.running, suspect, key=lambda sequence: sequence.id)
        num_rows = min(suspect.num_pending, self.limits.max_rows)
        while (pages := self._take_pages(suspect, num_rows)) is None:
            self._preempt(next(other for other in reversed(self.running) if other is not suspect))
        return self._rows(suspect, num_rows, pages)

    def _extend(self, sequence: Sequence, budget: int, scheduled: list[Rows]) -> tuple[Rows | None, bool]:
        """Give a running sequence rows and pages; preempt younger ones for it, or itself if it is the youngest."""
        num_rows = min(sequence.num_pending, budget)
        preempted = False
        while (pages := self._take_pages(sequence, num_rows)) is None:
            kept = {rows.sequence.id for rows in scheduled}
            victim = next(other for other in reversed(self.running) if other.id not in kept)
            self._preempt(victim)
            preempted = True
            if victim is sequence:
                return None, preempted
        return self._rows(sequence, num_rows, pages), preempted

    def _admit(self, budget: int) -> Rows | None:
        """Start the first waiting sequence if all that it has so far fits, with a page to grow."""
        sequence = self.waiting[0]
        if self.running and self.pool.pages_for(sequence.num_tokens + 1) > self.pool.num_free:
            return None
        num_rows = min(sequence.num_pending, budget)
        pages = self._take_pages(sequence, num_rows)
        if pages is None:
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        return self._rows(sequence, num_rows, pages)

    def _rows(self, sequence: Sequence, num_rows: int, pages: tuple[int, ...]) -> Rows:
        return Rows(sequence, sequence.num_computed, num_rows, pages, samples=num_rows == sequence.num_pending)

    def _take_pages(self, sequence: Sequence, num_rows: int) -> tuple[int, ...] | None:
        wanted = self.pool.pages_for(sequence.num_computed + num_rows) - len(sequence.pages)
        pages = self.pool.take(wanted, after=sequence.pages[-1] if sequence.pages else None)
        if pages is None:
            return None
        sequence.pages.extend(pages)
        return tuple(pages)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages = []
        sequence.rewind()
        self._released.append(sequence.id)


def _strike(sequence: Sequence, positions: range) -> None:
    common = range(max(sequence.struck.start, positions.start), min(sequence.struck.stop, positions.stop))
    if sequence.strikes and common:
        sequence.strikes, sequence.struck = sequence.strikes + 1, common
    else:
        # Elsewhere. A suspect stays one: alone, its steps are cut otherwise than in company.
        sequence.strikes, sequence.struck = max(1, min(sequence.strikes, SUSPECT_AFTER)), positions
