"""Token ids -> text, one at a time, never half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coordinator.text.decoding import Step


class Detokenizer:
    """The text of one completion as it grows.

    All texts that `push` and `flush` give, put together, are the tokenizer's decoding of all ids without special tokens. A token
    costs the same however long the text is.

    Args:
        token: spelling of an id; None for an id that is to be skipped (special, or unknown).
        steps: fresh steps of the tokenizer's decoder.

    """

    def __init__(self, token: Callable[[int], str | None], steps: Sequence[Step]) -> None:
        self._token = token
        self._steps = steps

    def push(self, token_id: int) -> str:
        """Take the next token, give the text that is certain now; empty while a character is incomplete."""
        token = self._token(token_id)
        return "" if token is None else self._run([token], self._steps)

    def flush(self) -> str:
        """Give the rest; nothing may be pushed afterwards."""
        return "".join([self._run(step.flush(), self._steps[number + 1 :]) for number, step in enumerate(self._steps)])

    @staticmethod
    def _run(pieces: Iterable[str], steps: Sequence[Step]) -> str:
        for step in steps:
            pieces = [text for piece in pieces for text in step.push(piece)]
        return "".join(pieces)
