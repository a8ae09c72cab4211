"""The output head: asks the shards for as little as decides the next tokens.

Most rows are decided by a few candidates of each shard and a logsumexp; rows with penalties, and the rare draw that falls
outside the candidates, ask for all logits in a second round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coordinator import sampler
from coordinator.scores import RowScores, from_logits, merge_candidates
from protos import shardworker_pb2, tensor_pb2
from protos.errors import WrongResult
from protos.shardworker_pb2 import ExecuteRequest
from protos.tensors import decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from coordinator.fanout import Fanout
    from coordinator.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Head:
    """The head of one model on one mesh."""

    fanout: Fanout
    wire: tensor_pb2.DType
    shard_vocabularies: tuple[int, ...]
    """Rows of the head that each shard holds."""

    async def choose(self, hidden: torch.Tensor, sequences: Rows[Sequence], step: int) -> list[sampler.Choice]:
        """Choose the next token of each sequence.

        Args:
            hidden: f32 [sequences, hidden], normed.
            sequences: whose newest token each row is.
            step: number of the step.

        Raises:
            MeshError: see `Fanout.round`.

        """
        wanted = [sampler.candidates_wanted(sequence.request.sampling, sequence.request.logprobs) for sequence in sequences]
        choices: list[sampler.Choice | None] = [None] * len(sequences)
        few = [row for row, count in enumerate(wanted) if count is not None]
        if few:
            temperatures = [sequences[row].request.sampling.temperature for row in few]
            most = max(count for count in wanted if count is not None)
            scores = await self._candidates(hidden[few], most, temperatures, step)
            for row, known in zip(few, scores, strict=True):
                choices[row] = _choose_from_candidates(known, sequences[row])
        undecided = [row for row, choice in enumerate(choices) if choice is None]
        if undecided:
            logits = await self._logits(hidden[undecided], step)
            for row, row_logits in zip(undecided, logits, strict=True):
                choices[row] = _choose_from_logits(row_logits, sequences[row])
        return [choice for choice in choices if choice is not None]

    async def _candidates(self, hidden: torch.Tensor, count: int, temperatures: list[float], step: int) -> list[RowScores]:
        request = ExecuteRequest(
            step=step,
            head=shardworker_pb2.Head(
                hidden=encode(hidden, self.wire),
                num_candidates=count,
                temperatures=[temperature or 1.0 for temperature in temperatures],
            ),
        )
        results = [reply.head for reply in await self.fanout.round(request, "head", len(hidden))]
        rows = len(hidden)
        for shard, result in enumerate(results):
            listed = min(count, self.shard_vocabularies[shard])
            shapes = [tuple(tensor.shape) for tensor in (result.candidates, result.logits, result.logsumexp)]
            if shapes != [(rows, listed), (rows, listed), (rows, 2)]:
                raise WrongResult(f"shard {shard} answered candidates of shapes {shapes}, wanted {rows} rows of {listed}")
        return merge_candidates(
            [decode(result.candidates) for result in results],
            [decode(result.logits) for result in results],
            [decode(result.logsumexp) for result in results],
            [count >= size for size in self.shard_vocabularies],
        )

    async def _logits(self, hidden: torch.Tensor, step: int) -> torch.Tensor:
        """Collect f32 [rows, vocabulary]."""
        request = ExecuteRequest(
            step=step,
            head=shardworker_pb2.Head(hidden=encode(hidden, self.wire), logits=True),
        )
        shards = [decode(reply.head.logits) for reply in await self.fanout.round(request, "head", len(hidden))]
        for shard, (logits, size) in enumerate(zip(shards, self.shard_vocabularies, strict=True)):
            if tuple(logits.shape) != (len(hidden), size):
                raise WrongResult(f"shard {shard} answered logits of shape {list(logits.shape)}, wanted [{len(hidden)}, {size}]")
        return torch.cat(shards, dim=1)


def _choose_from_candidates(scores: RowScores, sequence: Sequence) -> sampler.Choice | None:
    request = sequence.request
    uniform = sampler.draw(request.sampling.seed, len(sequence.generated))
    token = sampler.choose(scores, request.sampling, uniform)
    if token is None or request.logprobs is None:
        return None if token is None else sampler.Choice(token)
    return sampler.report(scores, token, request.logprobs)


def _choose_from_logits(logits: torch.Tensor, sequence: Sequence) -> sampler.Choice:
    request = sequence.request
    sampling = request.sampling
    uniform = sampler.draw(sampling.seed, len(sequence.generated))
    scores = from_logits(logits, sampling.temperature)
    penalized = scores
    if sampling.penalized:
        changed = sampler.penalize(logits, sampling, request.prompt, sequence.generated)
        penalized = from_logits(changed, sampling.temperature)
    token = sampler.choose(penalized, sampling, uniform)
    if token is None:
        raise WrongResult("all logits are known and yet no token could be chosen: they are not finite")
    if request.logprobs is None:
        return sampler.Choice(token)
    choice = sampler.report(scores, token, request.logprobs)
    if choice is None:
        raise WrongResult(f"token {token} is not in the vocabulary of {len(logits)}")
    return choice
