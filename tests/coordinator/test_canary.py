"""The canary on a fake model: what it sends, and what it takes for right."""

from collections.abc import Callable

import pytest
import torch

from coordinator.canary import PROMPT_TOKENS, TOLERANCE, Canary
from coordinator.pages import PagePool
from coordinator.sampler import Choice
from coordinator.scheduler import Step
from coordinator.sequence import Sequence, SequenceId
from protos.errors import WorkerLost, WrongResult

RIGHT = ((5, -0.2), (7, -1.9), (3, -4.0), (8, -5.0))


class FakeModel:
    """Forward and head: `answers` are the top log probabilities of each step that samples."""

    def __init__(self, *answers: tuple[tuple[int, float], ...]) -> None:
        self.answers = list(answers)
        self.steps: list[Step] = []
        self.numbers: list[int] = []

    async def run(self, step: Step, number: int) -> torch.Tensor:
        self.steps.append(step)
        self.numbers.append(number)
        return torch.zeros(sum(rows.samples for rows in step.rows), 1)

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], number: int) -> list[Choice]:
        assert (len(hidden), len(sequences), number) == (1, 1, self.numbers[-1])
        if not self.answers:
            raise WorkerLost("gone")
        top = self.answers.pop(0)
        return [Choice(top[0][0], top[0][1], top)]


def counter() -> Callable[[], SequenceId]:
    numbers = iter(range(1, 99))
    return lambda: SequenceId(next(numbers))


async def check(canary: Canary, model: FakeModel, pool: PagePool, released: tuple[SequenceId, ...] = ()) -> SequenceId:
    return await canary.check(model, model, counter(), pool, released)  # type: ignore[arg-type]


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 4, 16])
async def test_the_prompt_goes_whole_and_in_two_pieces_over_the_same_pages(page_tokens: int) -> None:
    pool = PagePool(4, page_tokens)
    canary = Canary(100, 50, counter())
    model = FakeModel(RIGHT, RIGHT)
    left = await check(canary, model, pool, (SequenceId(66),))
    whole, start, rest = model.steps
    assert [[(rows.position, rows.num_rows, rows.samples) for rows in step.rows] for step in model.steps] == [
        [(0, PROMPT_TOKENS, True)],
        [(0, PROMPT_TOKENS - 1, False)],
        [(PROMPT_TOKENS - 1, 1, True)],
    ]
    # Each step brings exactly the pages that its rows need, and what was in them before is dropped.
    needed = [pool.pages_for(tokens) for tokens in (PROMPT_TOKENS, PROMPT_TOKENS - 1)]
    assert [len(step.rows[0].pages) for step in model.steps] == [*needed, needed[0] - needed[1]]
    assert [step.released for step in model.steps] == [(66,), (whole.rows[0].sequence.id,), ()]
    assert start.rows[0].sequence is rest.rows[0].sequence
    assert left == rest.rows[0].sequence.id != whole.rows[0].sequence.id
    assert pool.num_used == 0
    prompt = whole.rows[0].sequence.request.prompt
    assert len(set(prompt)) == PROMPT_TOKENS
    assert 0 < min(prompt) < max(prompt) < 100


async def test_a_model_of_one_token_gets_one() -> None:
    model = FakeModel(RIGHT)
    await check(Canary(1, 1, counter()), model, PagePool(1, 1))
    assert [step.rows[0].sequence.request.prompt for step in model.steps] == [(0,)]


NEARLY = tuple((token, logprob + TOLERANCE / 2) for token, logprob in (RIGHT[1], RIGHT[0], *RIGHT[2:]))


async def test_rounding_is_forgiven_also_where_two_tokens_change_places() -> None:
    canary, pool = Canary(100, 50, counter()), PagePool(4, 4)
    await check(canary, FakeModel(RIGHT, NEARLY), pool)
    await check(canary, FakeModel(NEARLY, RIGHT), pool)


@pytest.mark.parametrize(
    "wrong",
    [
        ((5, -0.2), (7, -1.9), (3, -4.0), (8, -5.0 - 2 * TOLERANCE)),
        ((6, -0.2), (7, -1.9), (3, -4.0), (8, -5.0)),
        ((5, -0.6), (7, -1.9), (3, -4.0), (8, -5.0)),
    ],
    ids=["last", "token", "probability"],
)
async def test_another_answer_is_wrong_in_the_second_piece_and_on_the_next_mesh(wrong: tuple[tuple[int, float], ...]) -> None:
    canary, pool = Canary(100, 50, counter()), PagePool(4, 4)
    with pytest.raises(WrongResult, match="with the prompt in one piece they were 5 "):
        await check(canary, FakeModel(RIGHT, wrong), pool)
    # What was not right both times is nothing to go by.
    await check(canary, FakeModel(wrong, wrong), pool)
    with pytest.raises(WrongResult, match="on the mesh before they were"):
        await check(canary, FakeModel(RIGHT, RIGHT), pool)
    assert pool.num_used == 0


async def test_pages_are_free_again_when_the_mesh_breaks() -> None:
    pool = PagePool(4, 4)
    with pytest.raises(WorkerLost):
        await check(Canary(100, 50, counter()), FakeModel(RIGHT), pool)
    assert pool.num_used == 0
