"""One token through the whole mesh, before callers' tokens and whenever there are none: does it come back, and is it right?

Right means: what comes of a prompt in one piece comes of it in two pieces as well, the second of which reads the keys and values
that all shards kept of the first; and it is what came on the mesh before, so that a worker that took another one's place with
other weights is found out. What the very first mesh says can only be compared with itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.request import Request
from coordinator.scheduler import Rows, Step
from coordinator.sequence import Sequence
from protos.errors import WrongResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.forward import Forward
    from coordinator.head import Head
    from coordinator.pages import PagePool
    from coordinator.sampler import Choice
    from coordinator.sequence import SequenceId

PROMPT_TOKENS = 4
NUM_TOP = 4
TOLERANCE = 0.15
"""Of log probabilities, nats: workers of unlike hardware round differently, in bfloat16 and int8 by a few hundredths; with a
slice that is not the model's, a few are off by whole nats."""


class Canary:
    """The canary of one model."""

    def __init__(self, vocabulary: int, most_tokens: int, next_id: Callable[[], SequenceId]) -> None:
        """Choose a prompt.

        Args:
            vocabulary: token ids are below it.
            most_tokens: of a sequence.
            next_id: gives a sequence's id that nobody else uses.

        """
        length = min(PROMPT_TOKENS, most_tokens)
        # From all over the embedding.
        self._prompt = tuple((2 * number + 1) * vocabulary // (2 * length) for number in range(length))
        self._next_id = next_id
        self._last: Choice | None = None

    async def check(
        self,
        forward: Forward,
        head: Head,
        next_number: Callable[[], int],
        pool: PagePool,
        released: tuple[SequenceId, ...],
    ) -> SequenceId:
        """Send the prompt through the mesh, whole and in two pieces.

        Args:
            forward: of the mesh.
            head: of the mesh.
            next_number: gives the number of the next step.
            pool: with free pages for the prompt, which are free again afterwards.
            released: sequences that the workers may still hold in such pages.

        Returns:
            The sequence of which the workers still hold keys and values.

        Raises:
            WrongResult: what came back is not what it was on the mesh before, or not the same both times.
            MeshError: nothing came back.

        """
        length = len(self._prompt)
        pages = pool.take(pool.pages_for(length), after=None)
        if pages is None:
            raise ValueError("the canary needs free pages")
        try:
            whole = self._sequence()
            step = Step((Rows(whole, 0, length, tuple(pages), samples=True),), released)
            first = await _choice(forward, head, next_number(), step)
            _compare(first, self._last, "on the mesh before")
            if length == 1:
                return whole.id
            cut, num_first = self._sequence(), pool.pages_for(length - 1)
            start = Rows(cut, 0, length - 1, tuple(pages[:num_first]), samples=False)
            await forward.run(Step((start,), (whole.id,)), next_number())
            rest = Rows(cut, length - 1, 1, tuple(pages[num_first:]), samples=True)
            _compare(await _choice(forward, head, next_number(), Step((rest,), ())), first, "with the prompt in one piece")
        finally:
            pool.give_back(pages)
        self._last = first
        return cut.id

    def _sequence(self) -> Sequence:
        return Sequence(self._next_id(), Request("canary", self._prompt, max_tokens=1, logprobs=NUM_TOP))


async def _choice(forward: Forward, head: Head, number: int, step: Step) -> Choice:
    hidden = await forward.run(step, number)
    (choice,) = await head.choose(hidden, [rows.sequence for rows in step.rows], number)
    return choice


def _compare(found: Choice, wanted: Choice | None, where: str) -> None:
    if wanted is None:
        return
    known = dict(found.top)
    # By probability and not by rank: two tokens that are equally likely may change places.
    close = [token for token, logprob in wanted.top if abs(known.get(token, found.top[-1][1]) - logprob) <= TOLERANCE]
    if len(close) < len(wanted.top):
        raise WrongResult(f"the canary's most likely tokens are {_show(found)}, {where} they were {_show(wanted)}")


def _show(choice: Choice) -> str:
    return ", ".join(f"{token} ({logprob:.2f})" for token, logprob in choice.top)
