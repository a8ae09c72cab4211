"""Schedules of random arrivals, limits and cancellations keep every promise of the scheduler."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.request import Request
from coordinator.scheduler import SUSPECT_AFTER, Limits, Rows, Scheduler, Step
from coordinator.sequence import Sequence, SequenceId
from protos.errors import OutOfMemory, QueueFull


def make(number: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(SequenceId(number), Request(f"r{number}", tuple(range(prompt)), max_tokens))


def token_of(sequence: Sequence) -> int:
    """What a deterministic model says next."""
    return (sequence.id * 31 + sequence.num_tokens * 7) % 1000


class Workers:
    """The caches of a mesh, as strict as the real ones: what is written where, by whom."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tables: dict[SequenceId, list[int]] = {}
        self.cells: dict[tuple[int, int], tuple[SequenceId, int, int]] = {}
        self.lengths: dict[SequenceId, int] = {}

    def run(self, step: Step) -> None:
        for identifier in step.released:
            self.tables.pop(identifier, None)
            self.lengths.pop(identifier, None)
        for rows in step.rows:
            self._write(rows.sequence, rows.position, rows.num_rows, rows.pages)
        held = [page for table in self.tables.values() for page in table]
        assert len(held) == len(set(held)), "a page in two tables: its old owner's release was not told first"

    def _write(self, sequence: Sequence, position: int, num_rows: int, pages: tuple[int, ...]) -> None:
        size = self.limits.page_tokens
        assert position == self.lengths.get(sequence.id, 0), "rows are not contiguous"
        table = self.tables.setdefault(sequence.id, [])
        table.extend(pages)
        assert all(0 <= page < self.limits.num_pages for page in pages)
        assert len(table) == -(-(position + num_rows) // size), "tokens do not fit exactly"
        for offset, token in enumerate(sequence.tokens(position, position + num_rows), start=position):
            self.cells[table[offset // size], offset % size] = (sequence.id, offset, token)
        self.lengths[sequence.id] = position + num_rows

    def read(self, sequence: Sequence) -> list[int]:
        """All tokens of a sequence, from its pages."""
        size = self.limits.page_tokens
        found = [self.cells[self.tables[sequence.id][at // size], at % size] for at in range(self.lengths[sequence.id])]
        assert [(owner, at) for owner, at, _ in found] == [(sequence.id, at) for at in range(len(found))]
        return [token for _, _, token in found]


class Simulation:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.workers = Workers(limits)
        self.live: list[Sequence] = []

    def check(self, step: Step) -> None:
        limits, running = self.limits, self.scheduler.running
        assert 0 < step.num_rows <= limits.max_rows
        assert len(running) <= limits.max_running
        assert all(rows.num_rows >= 1 for rows in step.rows)
        assert len({rows.sequence.id for rows in step.rows}) == len(step.rows)
        assert {rows.sequence.id for rows in step.rows} <= {sequence.id for sequence in running}
        held = [page for sequence in running for page in sequence.pages]
        assert len(held) == len(set(held)) == self.scheduler.pool.num_used <= limits.num_pages
        assert all(not sequence.pages and not sequence.num_computed for sequence in self.scheduler.waiting)
        for rows in step.rows:
            assert rows.samples == (rows.position + rows.num_rows == rows.sequence.num_tokens)

    def step(self, cancel_in_flight: list[Sequence] | None = None) -> Step | None:
        decoding = [sequence for sequence in self.scheduler.running if sequence.num_pending == 1]
        step = self.scheduler.schedule()
        if step is None:
            assert not self.scheduler.running
            assert not self.scheduler.waiting
            return None
        self.check(step)
        # A decode row is missing only if its pages were taken or the whole budget went to decode rows.
        stepped = {rows.sequence.id for rows in step.rows}
        left_out = [one for one in decoding if one.id not in stepped and one in self.scheduler.running]
        if left_out:
            assert all(rows.num_rows == 1 for rows in step.rows)
            assert step.num_rows == self.limits.max_rows
        self.workers.run(step)
        for rows in step.rows:
            end = rows.position + rows.num_rows
            assert self.workers.read(rows.sequence) == rows.sequence.tokens(0, end)
        for sequence in cancel_in_flight or []:
            self.finish(sequence)
        tokens = {rows.sequence.id: token_of(rows.sequence) for rows in step.rows if rows.samples}
        self.scheduler.advance(step, tokens)
        for rows in step.rows:
            sequence = rows.sequence
            if not sequence.finished and len(sequence.generated) >= sequence.request.max_tokens:
                self.finish(sequence)
        return step

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.scheduler.finish(sequence)  # idempotent
        assert not sequence.pages
        if sequence in self.live:
            self.live.remove(sequence)

    def drain(self) -> int:
        steps = 0
        # What one alone needs, for all of them, and as much again for each preemption, is far below this.
        bound = 200 + 50 * sum(one.num_tokens + one.request.max_tokens for one in self.live)
        while self.step():
            steps += 1
            assert steps < bound, "livelock"
        return steps


LIMITS = st.builds(
    Limits,
    num_pages=st.integers(1, 12),
    page_tokens=st.integers(1, 5),
    max_rows=st.integers(1, 9),
    max_running=st.integers(1, 6),
    max_waiting=st.integers(1, 8),
)


@settings(max_examples=150, deadline=None)
@given(limits=LIMITS, seed=st.integers(0, 2**32 - 1), arrivals=st.integers(1, 25))
def test_random_life_keeps_all_promises(limits: Limits, seed: int, arrivals: int) -> None:
    chooser = random.Random(seed)  # noqa: S311
    simulation = Simulation(limits)
    everybody: list[Sequence] = []
    for number in range(1, arrivals + 1):
        sequence = make(number, chooser.randint(1, 14), chooser.randint(1, 10))
        most = sequence.num_tokens + sequence.request.max_tokens
        waiting = len(simulation.scheduler.waiting) - (limits.max_running - len(simulation.scheduler.running))
        try:
            simulation.scheduler.add(sequence)
        except OutOfMemory:
            assert most > limits.kv_tokens
        except QueueFull:
            assert waiting >= limits.max_waiting
        else:
            assert most <= limits.kv_tokens
            assert waiting < limits.max_waiting
            everybody.append(sequence)
            simulation.live.append(sequence)
        for _ in range(chooser.randrange(3)):
            victims = [chooser.choice(simulation.live)] if simulation.live and chooser.random() < 0.15 else []
            simulation.step(victims)
        if simulation.live and chooser.random() < 0.1:
            simulation.finish(chooser.choice(simulation.live))
        if chooser.random() < 0.05:
            # Another mesh: nothing is held there.
            simulation.scheduler.rewind()
            simulation.workers = Workers(limits)
    simulation.drain()
    assert not simulation.live
    assert simulation.scheduler.pool.num_used == 0
    assert all(sequence.finished for sequence in everybody)


@settings(max_examples=60, deadline=None)
@given(pages=st.integers(3, 8), rows=st.integers(1, 16), count=st.integers(2, 8), seed=st.integers(0, 1000))
def test_preempted_sequences_say_what_they_say_alone(pages: int, rows: int, count: int, seed: int) -> None:
    chooser = random.Random(seed)  # noqa: S311
    limits = Limits(num_pages=pages, page_tokens=4, max_rows=rows, max_running=8, max_waiting=100)
    crowd = Simulation(limits)
    shapes = [(chooser.randint(1, 8), chooser.randint(1, 4)) for _ in range(count)]
    sequences = [make(number, *shape) for number, shape in enumerate(shapes, start=1)]
    for sequence in sequences:
        crowd.scheduler.add(sequence)
        crowd.live.append(sequence)
    crowd.drain()
    for number, shape in enumerate(shapes, start=1):
        alone = Simulation(limits)
        single = make(number, *shape)
        alone.scheduler.add(single)
        alone.live.append(single)
        alone.drain()
        assert sequences[number - 1].generated == single.generated


def test_preemption_happens_and_the_oldest_never_suffers() -> None:
    simulation = Simulation(Limits(num_pages=4, page_tokens=2, max_rows=8, max_running=4, max_waiting=10))
    oldest, *others = sequences = [make(number, 2, 6) for number in range(1, 4)]
    for sequence in sequences:
        simulation.scheduler.add(sequence)
        simulation.live.append(sequence)
    order = []
    while simulation.step():
        assert oldest.finished or oldest in simulation.scheduler.running
        order += [one.id for one in sequences if one.finished and one.id not in order]
    assert order == [1, 2, 3]
    assert simulation.scheduler.num_preemptions > 0
    assert all(len(one.generated) == 6 for one in others)


def test_preempted_sequence_is_released_in_the_step_that_reuses_its_pages() -> None:
    scheduler = Scheduler(Limits(num_pages=2, page_tokens=2, max_rows=8, max_running=4, max_waiting=10))
    first, second = make(1, 2, 2), make(2, 1, 2)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step is not None
    scheduler.advance(step, {first.id: 0, second.id: 0})
    assert second.pages == [1]
    step = scheduler.schedule()
    assert step is not None
    assert step.released == (second.id,)
    assert [(rows.sequence, rows.pages) for rows in step.rows] == [(first, (1,))]
    assert list(scheduler.waiting) == [second]
    assert (second.pages, second.num_computed, scheduler.num_preemptions) == ([], 0, 1)


def test_finished_sequence_is_released_in_the_next_step() -> None:
    scheduler = Scheduler(Limits(num_pages=8, page_tokens=2))
    first, second = make(1, 3, 2), make(2, 3, 2)
    scheduler.add(first)
    assert scheduler.schedule()
    scheduler.finish(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step is not None
    assert step.released == (1,)
    assert step.rows[0].pages == (0, 1)


def test_cancel_in_flight_draws_nothing_for_the_cancelled() -> None:
    scheduler = Scheduler(Limits(num_pages=8, page_tokens=2))
    first, second = make(1, 3, 4), make(2, 3, 4)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step is not None
    scheduler.finish(first)
    scheduler.advance(step, {first.id: 7, second.id: 8})
    assert (first.generated, second.generated) == ([], [8])
    following = scheduler.schedule()
    assert following is not None
    assert [rows.sequence for rows in following.rows] == [second]
    assert following.released == (1,)


def test_decode_rows_go_before_prompts_and_prompts_fill_the_rest() -> None:
    scheduler = Scheduler(Limits(num_pages=100, page_tokens=4, max_rows=10))
    first, long = make(1, 4, 50), make(2, 40, 5)
    scheduler.add(first)
    step = scheduler.schedule()
    assert step is not None
    scheduler.advance(step, {first.id: 1})
    scheduler.add(long)
    chunks = []
    while len(long.generated) == 0:
        step = scheduler.schedule()
        assert step is not None
        assert (step.rows[0].sequence, step.rows[0].num_rows) == (first, 1)
        chunks.append(step.rows[1].num_rows)
        assert step.rows[1].samples == (sum(chunks) == 40)
        scheduler.advance(step, {first.id: 1, long.id: 2})
    assert chunks == [9, 9, 9, 9, 4]


def test_rewind_replays_in_the_old_order() -> None:
    scheduler = Scheduler(Limits(num_pages=100, page_tokens=4))
    sequences = [make(number, 3, 9) for number in range(1, 4)]
    for sequence in sequences:
        scheduler.add(sequence)
    step = scheduler.schedule()
    assert step is not None
    scheduler.advance(step, {sequence.id: 5 for sequence in sequences})
    scheduler.add(make(4, 1, 1))
    scheduler.rewind()
    assert scheduler.pool.num_used == 0
    step = scheduler.schedule()
    assert step is not None
    assert [(rows.sequence.id, rows.position, rows.num_rows) for rows in step.rows] == [
        (1, 0, 4),
        (2, 0, 4),
        (3, 0, 4),
        (4, 0, 1),
    ]
    assert set(step.released) == {1, 2, 3}


def test_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4))
    scheduler.add(make(1, 10, 6))
    with pytest.raises(OutOfMemory, match=r"up to 17 tokens of KV cache, the mesh has 16: .*--kv-tokens"):
        scheduler.add(make(2, 10, 7))


def test_full_queue_is_refused_and_the_queue_stays_as_it_is() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4, max_running=1, max_waiting=2))
    scheduler.add(make(9, 1, 2))
    scheduler.schedule()
    scheduler.add(make(1, 1, 1))
    scheduler.add(make(2, 1, 1))
    with pytest.raises(QueueFull, match="2 requests are waiting already: retry later"):
        scheduler.add(make(3, 1, 1))
    assert [sequence.id for sequence in scheduler.waiting] == [1, 2]


def test_places_that_could_run_are_not_counted_as_waiting_and_those_who_arrive_are() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4, max_running=3, max_waiting=2))
    for number in range(1, 5):
        scheduler.add(make(number, 1, 1))
    scheduler.check_room()
    with pytest.raises(QueueFull, match="2 requests are waiting already: retry later"):
        scheduler.check_room(1)


def test_suspects_have_steps_to_themselves_until_their_next_token() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4, max_rows=2))
    sequences = [make(1, 1, 9), make(2, 4, 9), make(3, 1, 9)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(SUSPECT_AFTER):
        step = scheduler.schedule()
        assert step is not None
        assert [rows.sequence.id for rows in step.rows] == [1, 2]
        assert scheduler.strike(step) == []
        scheduler.rewind()
    # Each alone, the second in two chunks of its prompt.
    for wanted in ([1], [2], [2]):
        step = scheduler.schedule()
        assert step is not None
        assert [rows.sequence.id for rows in step.rows] == wanted
        scheduler.advance(step, {SequenceId(number): 7 for number in wanted})
    step = scheduler.schedule()
    assert step is not None
    assert [rows.sequence.id for rows in step.rows] == [1, 2]
    # And only who breaks two more by itself is guilty.
    scheduler.rewind()
    for guilty in ([], [], [], [1, 2]):
        assert [sequence.id for sequence in scheduler.strike(step)] == guilty


def test_who_is_struck_here_and_there_only_had_bad_luck() -> None:
    scheduler = Scheduler(Limits(num_pages=9, page_tokens=4, max_rows=4))
    sequence = make(1, 20, 9)
    scheduler.add(sequence)
    for chunks in (1, 2, 3, 4, 1, 3, 2):
        for chunk in range(1, chunks + 1):
            step = scheduler.schedule()
            assert step is not None
            if chunk < chunks:
                scheduler.advance(step, {})
        # The worker died in another chunk of the prompt than before.
        assert scheduler.strike(step) == []
        assert sequence.strikes == 1
        scheduler.rewind()


def test_who_breaks_meshes_at_one_place_is_found_however_its_chunks_are_cut() -> None:
    scheduler = Scheduler(Limits(num_pages=9, page_tokens=4, max_rows=8))
    sequence = make(1, 20, 9)
    scheduler.add(sequence)
    broken = []
    for rows in ((0, 8), (4, 8), (6, 3), (5, 4)):
        broken = scheduler.strike(Step((Rows(sequence, *rows, (), samples=False),), ()))
        assert 6 in sequence.struck
    assert broken == [sequence]


def test_a_suspect_that_is_gone_is_suspected_no_more() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4))
    sequences = [make(1, 1, 9), make(2, 1, 9)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(SUSPECT_AFTER):
        step = scheduler.schedule()
        assert step is not None
        scheduler.strike(step)
        scheduler.rewind()
    scheduler.finish(sequences[0])
    step = scheduler.schedule()
    assert step is not None
    assert [rows.sequence.id for rows in step.rows] == [2]
    scheduler.advance(step, {SequenceId(2): 7})
    scheduler.finish(sequences[1])
    assert scheduler.schedule() is None
    assert scheduler.pool.num_used == 0


def test_suspects_take_the_pages_of_others() -> None:
    scheduler = Scheduler(Limits(num_pages=2, page_tokens=2, max_rows=8))
    first, second = make(1, 2, 2), make(2, 1, 2)
    for sequence in (first, second):
        scheduler.add(sequence)
    step = scheduler.schedule()
    assert step is not None
    for _ in range(SUSPECT_AFTER):
        scheduler.strike(Step(step.rows[1:], ()))
    # It runs already, and what it needs the first one holds.
    scheduler.advance(step, {SequenceId(1): 7, SequenceId(2): 7})
    assert second.strikes == 0
    for _ in range(SUSPECT_AFTER):
        scheduler.strike(Step(step.rows[1:], ()))
    alone = scheduler.schedule()
    assert alone is not None
    assert [rows.sequence.id for rows in alone.rows] == [2]


def test_cancelled_while_waiting_leaves_the_queue() -> None:
    scheduler = Scheduler(Limits(num_pages=4, page_tokens=4, max_running=1))
    first, second = make(1, 1, 5), make(2, 1, 5)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.finish(second)
    assert not scheduler.waiting
    scheduler.finish(first)
    assert scheduler.schedule() is None
    assert not scheduler.waiting
    assert not scheduler.running


def spans(total: int) -> Iterator[tuple[int, int]]:
    yield from ((start, end) for start in range(total + 1) for end in range(start, total + 1))


def test_sequence_tokens_are_slices_of_prompt_and_completion() -> None:
    sequence = make(1, 4, 9)
    sequence.generated += [10, 11, 12]
    whole = [0, 1, 2, 3, 10, 11, 12]
    assert all(sequence.tokens(start, end) == whole[start:end] for start, end in spans(7))
    assert (sequence.num_tokens, sequence.num_pending) == (7, 7)
    sequence.num_computed = 6
    assert sequence.num_pending == 1
    sequence.rewind()
    assert sequence.num_pending == 7
