"""The journal of one request: everything from which any worker's share of its KV cache can be rebuilt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from coordinator.request import Request

SequenceId = NewType("SequenceId", int)


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens, and how many of them the workers hold.

    Random draws need no state: the n-th token's draw is a function of the seed and n (`coordinator.sampler.draw`), so a
    replayed sequence goes on with the same tokens.
    """

    id: SequenceId
    request: Request
    generated: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values the workers hold."""
    pages: list[int] = field(default_factory=list)
    """KV pages in the order of positions."""
    finished: bool = False
    strikes: int = 0
    """Meshes that broke in a step with the same rows of it, since its last token (or since it came)."""
    struck: range = range(0)
    """Positions that were in all of those steps."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def num_pending(self) -> int:
        """Tokens that the workers have not seen yet: 1 while decoding, more while prompt or journal is replayed."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start <= i < end."""
        prompt = self.request.prompt
        if end <= len(prompt):
            return list(prompt[start:end])
        generated = self.generated[max(0, start - len(prompt)) : end - len(prompt)]
        return [*prompt[start:], *generated]

    def rewind(self) -> None:
        """Forget what the workers hold: the journal will be replayed from position 0."""
        self.num_computed = 0
