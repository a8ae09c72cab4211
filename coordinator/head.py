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
from protos import rpc, shardworker_pb2, tensor_pb2
from protos.errors import InvalidArgument, WrongResult
from protos.shardworker_pb2 import ExecuteRequest
from protos.tensors import all_finite, decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from coordinator.fanout import Fanout
    from coordinator.sequence import Sequence


REPLY_BYTES = rpc.MAX_WORKER_REPLY_BYTES // 4
"""Of logits in one reply: far below what a message may have, so that a round's memory stays small too."""


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
            temperatures = [sampler.shards_temperature(sequences[row].request.sampling) for row in few]
            counts = [count for count in wanted if count is not None]
            scores = await self._candidates(hidden if len(few) == len(wanted) else hidden[few], counts, temperatures, step)
            for row, known in zip(few, scores, strict=True):
                choices[row] = _choose_from_candidates(known, sequences[row])
        undecided = [row for row, choice in enumerate(choices) if choice is None]
        if undecided:
            logits = await self._logits(hidden[undecided], step)
            for row, row_logits in zip(undecided, logits, strict=True):
                choices[row] = _choose_from_logits(row_logits, sequences[row])
        return [choice for choice in choices if choice is not None]

    async def _candidates(self, hidden: torch.Tensor, counts: list[int], temperatures: list[float], step: int) -> list[RowScores]:
        """Collect the candidates of each row, `counts` of them from each shard."""
        request = ExecuteRequest(
            step=step,
            head=shardworker_pb2.Head(hidden=encode(hidden, self.wire), num_candidates=max(counts), temperatures=temperatures),
        )
        replies = await self.fanout.round(request, "head", len(hidden))
        shards = [self._listed(shard, reply.head, len(hidden), max(counts)) for shard, reply in enumerate(replies)]
        scores: dict[int, RowScores] = {}
        for count in set(counts):
            # Each row sees what it asked for itself: nothing may depend on what else is in the batch.
            rows = [row for row, wanted in enumerate(counts) if wanted == count]
            merged = merge_candidates(
                [listed.ids[rows, :count] for listed in shards],
                [listed.logits[rows, :count] for listed in shards],
                [listed.logsumexp[rows] for listed in shards],
                [count >= size for size in self.shard_vocabularies],
            )
            scores.update(zip(rows, merged, strict=True))
        return [scores[row] for row in range(len(hidden))]

    def _listed(self, shard: int, result: shardworker_pb2.HeadResult, rows: int, count: int) -> _Listed:
        """Read one shard's candidates."""
        listed = min(count, self.shard_vocabularies[shard])
        shapes = [tuple(tensor.shape) for tensor in (result.candidates, result.logits, result.logsumexp)]
        if shapes != [(rows, listed), (rows, listed), (rows, 2)]:
            raise _wrong(shard, f"candidates of shapes {shapes}, wanted {rows} rows of {listed}")
        dtypes = (result.candidates.dtype, result.logits.dtype, result.logsumexp.dtype)
        if dtypes != (tensor_pb2.DTYPE_I32, tensor_pb2.DTYPE_F32, tensor_pb2.DTYPE_F64):
            raise _wrong(shard, f"candidates, logits and logsumexp of dtypes {dtypes}, wanted I32, F32 and F64")
        ids, logits, logsumexp = (_decode(shard, one) for one in (result.candidates, result.logits, result.logsumexp))
        start = sum(self.shard_vocabularies[:shard])
        end = start + self.shard_vocabularies[shard]
        if listed and not start <= int(ids.min()) <= int(ids.max()) < end:
            raise _wrong(shard, f"candidates outside its vocabulary rows {start} to {end}")
        _check_finite(shard, logits, logsumexp)
        if bool((logits[:, 1:] > logits[:, :-1]).any()):
            raise _wrong(shard, "candidates that are not in the order of their logits")
        return _Listed(ids, logits, logsumexp)

    async def _logits(self, hidden: torch.Tensor, step: int) -> torch.Tensor:
        """Collect f32 [rows, vocabulary], in as many rounds as the size of a reply demands."""
        rows_of_a_round = max(1, REPLY_BYTES // (4 * max(self.shard_vocabularies)))
        return torch.cat([await self._logits_of_round(rows, step) for rows in hidden.split(rows_of_a_round)])

    async def _logits_of_round(self, hidden: torch.Tensor, step: int) -> torch.Tensor:
        request = ExecuteRequest(step=step, head=shardworker_pb2.Head(hidden=encode(hidden, self.wire), logits=True))
        replies = await self.fanout.round(request, "head", len(hidden))
        shards = [_decode(shard, reply.head.logits) for shard, reply in enumerate(replies)]
        for shard, (logits, size) in enumerate(zip(shards, self.shard_vocabularies, strict=True)):
            if logits.dtype != torch.float32 or tuple(logits.shape) != (len(hidden), size):
                found = f"logits of {logits.dtype} {list(logits.shape)}"
                raise _wrong(shard, f"{found}, wanted {torch.float32} [{len(hidden)}, {size}]")
            _check_finite(shard, logits)
        return torch.cat(shards, dim=1)


@dataclass(frozen=True, slots=True)
class _Listed:
    """One shard's candidates: ids and logits [rows, c], logsumexp f64 [rows, 2]."""

    ids: torch.Tensor
    logits: torch.Tensor
    logsumexp: torch.Tensor


def _check_finite(shard: int, *tensors: torch.Tensor) -> None:
    # A NaN would sort first and be chosen.
    if not all(all_finite(tensor) for tensor in tensors):
        raise _wrong(shard, "logits that are NaN or infinite")


def _decode(shard: int, message: tensor_pb2.Tensor) -> torch.Tensor:
    try:
        return decode(message)
    except InvalidArgument as error:
        raise _wrong(shard, f"a tensor that is none: {error}") from None


def _wrong(shard: int, what: str) -> WrongResult:
    return WrongResult(f"shard {shard} answered {what}", shards=(shard,))


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
        raise WrongResult("all logits are known and yet no token could be chosen")
    if request.logprobs is None:
        return sampler.Choice(token)
    choice = sampler.report(scores, token, request.logprobs)
    if choice is None:
        raise WrongResult(f"token {token} is not in the vocabulary of {len(logits)}")
    return choice
