"""The engine over a fake model whose next token is a function of all tokens before."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import torch

from coordinator.completion import Completion
from coordinator.engine import Engine
from coordinator.microbatches import LIMIT
from coordinator.observer import Observer
from coordinator.request import FinishReason, Request
from coordinator.sampler import Choice
from coordinator.scheduler import Limits, Step
from coordinator.sequence import Sequence, SequenceId
from protos.errors import InvalidArgument, MeshError, NotServing, OutOfMemory, QueueFull, WorkerLost

LIMITS = Limits(num_pages=100, page_tokens=4, max_rows=16)


def next_token(tokens: list[int]) -> int:
    return (sum((position + 1) * token for position, token in enumerate(tokens)) * 7 + 3) % 97


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeModel:
    """Forward and head in one; `before_step` may break it or wait."""

    def __init__(self, before_step: Callable[[int, Step], None] = lambda *_: None) -> None:
        self.before_step = before_step
        self.numbers: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.in_step = asyncio.Event()

    async def run(self, step: Step, number: int) -> torch.Tensor:
        self.numbers.append(number)
        self.in_step.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        self.before_step(number, step)
        return torch.zeros(sum(rows.samples for rows in step.rows), 1)

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        assert len(hidden) == len(sequences)
        assert step == self.numbers[-1]
        return [Choice(next_token(sequence.tokens(0, sequence.num_tokens))) for sequence in sequences]


def engine_of(limits: Limits = LIMITS) -> Engine:
    return Engine(limits, vocabulary=100, context=200)


@asynccontextmanager
async def running(engine: Engine, model: FakeModel) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(engine.run(model, model))  # type: ignore[arg-type]
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, MeshError):
            await task


async def collect(completion: Completion) -> list[int]:
    return [choice.token async for choice in completion.tokens()]


async def test_completion_ends_at_max_tokens() -> None:
    engine = engine_of()
    async with running(engine, FakeModel()):
        completion = engine.submit(Request("r", (1, 2, 3), 10))
        assert await collect(completion) == expected((1, 2, 3), 10)
        assert completion.reason is FinishReason.LENGTH
        timings = completion.timings
        assert min(timings.queue_ns, timings.prefill_ns, timings.decode_ns) > 0


async def test_completion_ends_at_a_stop_id_which_is_part_of_it() -> None:
    tokens = expected((1, 2, 3), 10)
    engine = engine_of()
    async with running(engine, FakeModel()):
        completion = engine.submit(Request("r", (1, 2, 3), 10, stop_ids=frozenset({tokens[4]})))
        found = await collect(completion)
    assert found == tokens[: tokens.index(tokens[4]) + 1]
    assert completion.reason is FinishReason.STOP


async def test_stop_id_as_the_last_token_is_a_stop() -> None:
    engine = engine_of()
    async with running(engine, FakeModel()):
        completion = engine.submit(Request("r", (5,), 1, stop_ids=frozenset(expected((5,), 1))))
        await collect(completion)
    assert completion.reason is FinishReason.STOP


@pytest.mark.parametrize("num_pages", [10, 100])
async def test_crowd_gets_what_each_gets_alone(num_pages: int) -> None:
    engine = engine_of(Limits(num_pages=num_pages, page_tokens=4, max_rows=7, max_running=5))
    prompts = [tuple(range(start, start + 1 + start % 9)) for start in range(20)]
    async with running(engine, FakeModel()):
        completions = [engine.submit(Request("r", prompt, 6 + number % 5)) for number, prompt in enumerate(prompts)]
        results = await asyncio.gather(*(collect(completion) for completion in completions))
    assert results == [expected(prompt, 6 + number % 5) for number, prompt in enumerate(prompts)]
    assert (engine.scheduler.num_preemptions > 0) == (num_pages == 10)
    assert engine.scheduler.pool.num_used == 0
    assert engine.statistics.prompt_tokens == sum(len(prompt) for prompt in prompts)
    assert engine.statistics.completion_tokens == sum(len(result) for result in results)


async def test_cancel_in_flight_frees_everything_before_the_next_step() -> None:
    engine, model = engine_of(), FakeModel()
    model.gate.clear()
    async with running(engine, model):
        cancelled, kept = engine.submit(Request("a", (1,), 50)), engine.submit(Request("b", (2,), 3))
        await model.in_step.wait()
        cancelled.cancel()
        cancelled.cancel()
        model.gate.set()
        assert await collect(kept) == expected((2,), 3)
    assert engine.statistics.completion_tokens == 3
    assert (engine.scheduler.running, engine.scheduler.pool.num_used) == ([], 0)
    assert cancelled.sequence.generated == []


async def test_failed_step_draws_nothing_and_the_replay_goes_on_with_the_same_tokens() -> None:
    def break_sometimes(number: int, step: Step) -> None:
        del step
        if number % (4 * LIMIT) == 0:
            raise WorkerLost("worker 1 died")

    engine = engine_of(Limits(num_pages=12, page_tokens=4, max_rows=8))
    prompts = [(1, 2, 3), (4,), (5, 6, 7, 8, 9, 10)]
    completions = [engine.submit(Request("r", prompt, 12)) for prompt in prompts]
    collecting = [asyncio.create_task(collect(completion)) for completion in completions]
    failures, resumed = 0, []
    while not all(task.done() for task in collecting):
        # Breaks in the fourth step of each mesh; then another one takes over.
        model = FakeModel(break_sometimes)
        async with running(engine, model) as task:
            await asyncio.wait([task, asyncio.create_task(engine.wait_idle())], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                assert isinstance(task.exception(), WorkerLost)
                failures += 1
                engine.interrupt(WorkerLost("worker 1 died"), lambda: resumed.append(engine.statistics.completion_tokens))
                assert engine.scheduler.pool.num_used == 0
            else:
                await asyncio.wait(collecting)
        # In the sessions of a mesh they rise.
        assert model.numbers == list(range(model.numbers[0], model.numbers[0] + LIMIT * len(model.numbers), LIMIT))
    assert failures > 2
    # A mesh may break before all that the one before interrupted have their next token.
    assert 0 < len(resumed) < failures
    assert [task.result() for task in collecting] == [expected(prompt, 12) for prompt in prompts]
    assert engine.statistics.completion_tokens == 36


def test_an_interruption_of_nobody_is_over_at_once() -> None:
    engine, resumed = engine_of(), list[int]()
    engine.interrupt(WorkerLost("worker 1 died"), lambda: resumed.append(1))
    engine.submit(Request("r", (1,), 1)).cancel()
    assert resumed == [1]


async def test_fail_ends_every_stream_exactly_once_with_the_error() -> None:
    engine = engine_of(Limits(num_pages=100, page_tokens=4, max_running=2))
    completions = [engine.submit(Request("r", (number + 1,), 100)) for number in range(5)]
    engine.scheduler.schedule()
    error = NotServing("no full mesh")
    engine.fail(error)
    engine.fail(error)
    for completion in completions:
        with pytest.raises(NotServing, match="no full mesh"):
            await collect(completion)
        assert completion._events.empty()
    await asyncio.wait_for(engine.wait_idle(), 1)
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running
    assert engine.scheduler.pool.num_used == 0


async def test_refusal_is_raised_until_it_is_lifted_and_gathers_no_tracebacks() -> None:
    engine = engine_of()
    engine.refusal = NotServing("the workers are loading")
    for _ in range(50):
        with pytest.raises(NotServing, match="loading"):
            engine.submit(Request("r", (1,), 1))
    depth, traceback = 0, engine.refusal.__traceback__
    while traceback:
        depth, traceback = depth + 1, traceback.tb_next
    assert depth <= 3
    engine.refusal = None
    engine.submit(Request("r", (1,), 1))


async def test_wait_idle_waits_for_the_last_request() -> None:
    engine, model = engine_of(), FakeModel()
    await asyncio.wait_for(engine.wait_idle(), 1)
    model.gate.clear()
    async with running(engine, model):
        completions = [engine.submit(Request("r", (1,), 2)) for _ in range(2)]
        waiter = asyncio.create_task(engine.wait_idle())
        await model.in_step.wait()
        assert not waiter.done()
        completions[0].cancel()
        assert not waiter.done()
        model.gate.set()
        await asyncio.wait_for(waiter, 5)
        assert len(await collect(completions[1])) == 2


async def test_engine_sleeps_between_requests() -> None:
    engine, model = engine_of(), FakeModel()
    async with running(engine, model):
        for number in range(3):
            assert await collect(engine.submit(Request("r", (number,), 2))) == expected((number,), 2)
            steps = engine.statistics.steps
            for _ in range(10):
                await asyncio.sleep(0)
            assert engine.statistics.steps == steps == (number + 1) * 2


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "text"),
    [
        ((1, 100), 1, InvalidArgument, "token id 100 is outside the vocabulary of 100"),
        ((1,) * 150, 51, InvalidArgument, "are 201 tokens together, the model's context holds 200"),
        ((1,) * 10, 31, OutOfMemory, "up to 41 tokens of KV cache, the mesh has 40"),
    ],
)
async def test_request_that_cannot_be_served_is_refused(
    prompt: tuple[int, ...], max_tokens: int, error: type[MeshError], text: str
) -> None:
    engine = engine_of(Limits(num_pages=10, page_tokens=4))
    with pytest.raises(error, match=text):
        engine.submit(Request("r", prompt, max_tokens))
    assert engine.statistics.prompt_tokens == 0
    await asyncio.wait_for(engine.wait_idle(), 1)


async def test_full_queue_is_refused() -> None:
    engine = engine_of(Limits(num_pages=10, page_tokens=4, max_running=1, max_waiting=1))
    engine.submit(Request("r", (1,), 1))
    # The place is kept while the request is read.
    with engine.arrive(), pytest.raises(QueueFull), engine.arrive():
        pass
    engine.submit(Request("r", (1,), 1))
    with pytest.raises(QueueFull):
        engine.submit(Request("r", (1,), 1))


class Recorder(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def step_started(self, step: Step, number: int) -> None:
        self.heard.append(("started", step.num_rows, number))

    def step_ended(self) -> None:
        self.heard.append(("ended",))

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        assert pause_ns > 0
        self.heard.append(("token", completion.sequence.generated[-1]))

    def completion_ended(self, completion: Completion) -> None:
        self.heard.append(("over", completion.outcome))

    def request_refused(self, error: MeshError) -> None:
        self.heard.append(("refused", error.reason))


async def test_an_observer_hears_of_steps_tokens_and_ends_in_order() -> None:
    recorder, tokens = Recorder(), expected((1, 2), 2)
    engine = Engine(LIMITS, vocabulary=100, context=200, observer=recorder)
    model = FakeModel()
    async with running(engine, model):
        await collect(engine.submit(Request("r", (1, 2), 2)))
        await asyncio.sleep(0)
    first, second = model.numbers[:2]
    assert recorder.heard == [
        ("started", 2, first),
        ("token", tokens[0]),
        ("ended",),
        ("started", 1, second),
        ("token", tokens[1]),
        ("over", "length"),
        ("ended",),
    ]


async def test_an_observer_hears_why_requests_end_or_never_begin() -> None:
    recorder = Recorder()
    engine = Engine(LIMITS, vocabulary=100, context=200, observer=recorder)
    engine.submit(Request("gone", (1,), 5)).cancel()
    engine.submit(Request("stopped", (1,), 5)).stop()
    engine.submit(Request("failed", (1,), 5))
    engine.fail(WorkerLost("worker 1 died"))
    for request in (Request("r", (100,), 5), Request("r", (1,), 500)):
        with pytest.raises(InvalidArgument):
            engine.submit(request)
    engine.refusal = NotServing("no mesh")
    with pytest.raises(NotServing), engine.arrive():
        pass
    engine.refusal = None
    with pytest.raises(InvalidArgument), engine.arrive():
        raise InvalidArgument("no prompt")
    ends = [("over", "abort"), ("over", "stop"), ("over", "WORKER_LOST")]
    assert recorder.heard == [
        *ends,
        *[("refused", reason) for reason in ("INVALID_ARGUMENT",) * 2 + ("NOT_SERVING", "INVALID_ARGUMENT")],
    ]


async def test_another_mesh_may_be_of_another_size() -> None:
    engine = engine_of(Limits(num_pages=1, page_tokens=4))
    engine.refusal = NotServing("loading")
    with pytest.raises(NotServing):
        engine.submit(Request("r", (1,), 100))
    engine.move(Limits(num_pages=100, page_tokens=4), SequenceId(7))
    engine.refusal = None
    assert engine.max_tokens == 200
    assert engine.scheduler.limits.num_pages == 100
    engine.submit(Request("r", (1, 2, 3), 100))
    step = engine.scheduler.schedule()
    assert step is not None
    # What the canary left on the workers.
    assert step.released == (7,)
    assert engine.scheduler.needed_tokens == 103
    with pytest.raises(ValueError, match="pages of another mesh"):
        engine.move(Limits(num_pages=50, page_tokens=4), SequenceId(8))
    engine.interrupt(None, when_resumed=lambda: None)
    engine.move(Limits(num_pages=50, page_tokens=4), SequenceId(8))
    step = engine.scheduler.schedule()
    assert step is not None
    assert (step.released, step.rows[0].position, step.rows[0].num_rows) == ((8,), 0, 3)
