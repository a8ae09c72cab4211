"""What a caller asks for, checked once, in token ids: no text and no message gets past the edge."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from protos.errors import InvalidArgument

MAX_TOP_LOGPROBS = 20
MAX_PENALTY = 2.0
REPETITION_PENALTIES = (0.01, 100.0)
"""Beyond, logits leave what a float holds sooner than a penalty makes sense."""
MAX_SEED = 2**64
GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy: logits divided by them would leave what a float holds."""


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = enum.auto()
    LENGTH = enum.auto()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the fields are those of `shardmesh.v1.Sampling` with its defaults.

    Raises:
        InvalidArgument: a field is not a number or out of its range.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check all ranges."""
        _check("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 means all)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        least, most = REPETITION_PENALTIES
        _check(
            "repetition_penalty", self.repetition_penalty, least <= self.repetition_penalty <= most, f"in [{least:g}, {most:g}]"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, abs(value) <= MAX_PENALTY, f"in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        _check("seed", self.seed, 0 <= self.seed < MAX_SEED, "in [0, 2^64)")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether logits of seen tokens are changed, which needs all logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check(name: str, value: float, ok: bool, wanted: str) -> None:  # noqa: FBT001  # the condition belongs to the value
    if not math.isfinite(value) or not ok:
        raise InvalidArgument(f"{name} must be {wanted}, found {value}")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make.

    Raises:
        InvalidArgument: empty prompt, nothing to generate, too many logprobs.

    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    """How many most likely tokens to report beside each chosen one; None: no log probabilities."""

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not self.prompt:
            raise InvalidArgument("the prompt is empty: at least one token is needed")
        if self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens must be >= 1, found {self.max_tokens}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidArgument(f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], found {self.logprobs}")


def check_against_model(request: Request, vocabulary: int, context: int) -> None:
    """Check a request against the model that it is for.

    Raises:
        InvalidArgument: token ids outside the vocabulary, or more tokens than the context has.

    """
    if outside := [token for token in request.prompt if not 0 <= token < vocabulary]:
        raise InvalidArgument(f"token id {outside[0]} is outside the vocabulary of {vocabulary}")
    most = len(request.prompt) + request.max_tokens
    if most > context:
        raise InvalidArgument(
            f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens}) are {most} tokens together, "
            f"the model's context holds {context}"
        )
