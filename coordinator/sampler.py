"""Scores -> token. Pure: the same scores, parameters and draw give the same token.

The order of cuts is the usual one: penalties, temperature, top-k, top-p, min-p. A draw walks down the remaining
probabilities, best token first. Where the known candidates do not decide the outcome, `choose` says so by returning None
and is asked again with all logits. Both ways give the same token, but for a draw that meets the border between two tokens to
within the rounding of float64 sums (about 1e-15): the shards' logsumexp is float64 too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.rpc import MAX_CANDIDATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.request import Sampling
    from coordinator.scores import RowScores

DEFAULT_CANDIDATES = 64
"""Candidates asked of each shard where the cut is by probability: almost always enough."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and log probabilities if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token, log probability) of the most likely tokens, best first."""


def draw(seed: int, index: int) -> float:
    """Uniform number in [0, 1) for the completion's token number `index`: a function, so that a replay draws the same."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def candidates_wanted(sampling: Sampling, num_top: int | None) -> int | None:
    """How many candidates each shard should give for a row; None if all logits are needed.

    One more than the cut keeps: the last one only marks the floor.
    """
    if sampling.penalized:
        return None
    report = num_top or 0
    if sampling.greedy:
        return report + 1
    keep = sampling.top_k or DEFAULT_CANDIDATES
    wanted = max(keep, report) + 1
    return wanted if wanted <= MAX_CANDIDATES else None


def shards_temperature(sampling: Sampling) -> float:
    """By what the shards should divide logits for their scaled logsumexp; 1 where it is not used."""
    return 1.0 if sampling.greedy or sampling.top_k else sampling.temperature


def penalize(logits: torch.Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> torch.Tensor:
    """Apply the penalties: repetition as in CTRL (prompt and output count), presence and frequency as OpenAI's (output only).

    Args:
        logits: [vocabulary]; not changed.
        sampling: the penalties.
        prompt: token ids.
        generated: token ids.

    """
    result = logits.double().clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), dtype=torch.long)
        values = result[seen]
        penalty = sampling.repetition_penalty
        result[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(generated)
        ids = torch.tensor(list(counts), dtype=torch.long)
        times = torch.tensor(list(counts.values()), dtype=torch.float64)
        result[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return result


def choose(scores: RowScores, sampling: Sampling, uniform: float) -> int | None:
    """Choose a token; None if the candidates do not suffice (never with complete scores).

    Args:
        scores: after penalties.
        sampling: temperature and cuts.
        uniform: in [0, 1).

    """
    if sampling.greedy:
        certain = scores.complete or len(scores.ids) == 1 or float(scores.logits[0]) > scores.floor
        return int(scores.ids[0]) if certain else None
    probabilities, closed = _kept(scores, sampling)
    if not closed and (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0):
        return None
    cumulative = torch.cumsum(probabilities, dim=0)
    index = int(torch.searchsorted(cumulative, uniform, right=True))
    if index < len(cumulative):
        return int(scores.ids[index])
    # Beyond what is listed: nothing but rounding if that is all there is.
    return int(scores.ids[len(cumulative) - 1]) if closed else None


def report(scores: RowScores, token: int, num_top: int) -> Choice | None:
    """Add log probabilities before temperature, penalties and cuts; None if the candidates do not suffice.

    Args:
        scores: without penalties.
        token: the chosen one.
        num_top: how many of the most likely tokens to report.

    """
    found = (scores.ids == token).nonzero()
    if not len(found) or (not scores.complete and len(scores.ids) < num_top):
        return None
    logprobs = scores.logits - scores.logsumexp
    top = zip(scores.ids[:num_top].tolist(), logprobs[:num_top].tolist(), strict=True)
    return Choice(token, float(logprobs[found[0, 0]]), tuple(top))


def _kept(scores: RowScores, sampling: Sampling) -> tuple[torch.Tensor, bool]:
    """Cut the listed tokens: probabilities of those that survive, best first, and whether none beyond the list survives.

    Probabilities sum to 1 over all that survive a cut; where nothing is cut, what is not listed is missing from the sum.
    """
    scaled = scores.logits / sampling.temperature
    closed = scores.complete
    normalizer = torch.tensor(scores.scaled_logsumexp, dtype=torch.float64)
    if sampling.top_k:
        closed |= len(scaled) >= sampling.top_k
        if not closed:
            # Their sum is not known, so no cut by probability can be made either.
            return torch.exp(scaled - normalizer), False
        scaled = scaled[: sampling.top_k]
        normalizer = torch.logsumexp(scaled, dim=0)
    probabilities = torch.exp(scaled - normalizer)
    if sampling.top_p < 1:
        reached = torch.cumsum(probabilities, dim=0)
        closed |= bool(reached[-1] >= sampling.top_p)
        probabilities = probabilities[reached - probabilities < sampling.top_p]
    if sampling.min_p > 0:
        survive = probabilities >= sampling.min_p * probabilities[0]
        closed |= not bool(survive.all()) or scores.floor / sampling.temperature < float(scaled[0]) + math.log(sampling.min_p)
        probabilities = probabilities[survive]
    if sampling.top_p < 1 or sampling.min_p > 0:
        probabilities = probabilities / probabilities.sum()
    return probabilities, closed
