"""Where a step is cut in two."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.microbatches import MIN_ROWS, microbatches
from coordinator.request import Request
from coordinator.scheduler import Rows, Step
from coordinator.sequence import Sequence, SequenceId


def step_of(*counts: int) -> Step:
    sequences = [Sequence(SequenceId(number), Request("", (1,) * count, max_tokens=1)) for number, count in enumerate(counts)]
    rows = tuple(Rows(sequence, 0, len(sequence.request.prompt), (), samples=True) for sequence in sequences)
    return Step(rows, (SequenceId(99),))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_halves_are_the_step_in_order_and_none_is_small(counts: list[int]) -> None:
    step = step_of(*counts)
    parts = microbatches(step)
    assert tuple(rows for part in parts for rows in part.rows) == step.rows
    assert [released for part in parts for released in part.released] == list(step.released)
    if len(parts) == 1:
        assert all(min(sum(counts[:cut]), sum(counts[cut:])) < MIN_ROWS for cut in range(len(counts)))
    else:
        assert parts[0].released == step.released
        assert min(part.num_rows for part in parts) >= MIN_ROWS


def test_the_cut_is_as_even_as_the_sequences_allow() -> None:
    assert [part.num_rows for part in microbatches(step_of(100, 20, 90, 80))] == [120, 170]
    assert len(microbatches(step_of(512))) == 1
    assert len(microbatches(step_of(*[1] * 64))) == 1
