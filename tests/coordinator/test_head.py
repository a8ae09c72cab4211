"""The head over shards that hold rows of one matrix: few candidates decide as all logits do."""

import pytest
import torch

from coordinator.head import Head
from coordinator.request import Request, Sampling
from coordinator.sequence import Sequence, SequenceId
from protos.errors import WrongResult
from protos.shardworker_pb2 import ExecuteRequest, ExecuteResponse, HeadResult
from protos.shardworker_pb2 import Head as HeadRequest
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F32, DTYPE_F64, DTYPE_I32
from protos.tensors import decode, encode

HIDDEN = 8
SIZES = (40, 7, 53)
MATRIX = torch.randn(sum(SIZES), HIDDEN, generator=torch.Generator().manual_seed(0))


class FakeShards:
    def __init__(self) -> None:
        self.requests: list[ExecuteRequest] = []
        self.spoil: dict[int, HeadResult] = {}
        self.matrix = MATRIX

    async def round(self, request: ExecuteRequest, result: str, num_rows: int) -> list[ExecuteResponse]:
        assert result == "head"
        self.requests.append(request)
        hidden = decode(request.head.hidden)
        assert len(hidden) == num_rows
        parts = self.matrix.split(SIZES)
        # Row by row: a product's bits depend on how many rows it has.
        products = [torch.stack([part @ row for row in hidden]) for part in parts]
        answers = [self._answer(request.head, logits, sum(SIZES[:shard])) for shard, logits in enumerate(products)]
        return [ExecuteResponse(head=self.spoil.get(shard, answer)) for shard, answer in enumerate(answers)]

    def _answer(self, head: HeadRequest, logits: torch.Tensor, start: int) -> HeadResult:
        if head.logits:
            return HeadResult(logits=encode(logits, DTYPE_F32))
        assert all(0 < one < float("inf") for one in head.temperatures)
        assert len(head.temperatures) == len(logits)
        assert 1 <= head.num_candidates <= 1024
        ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
        count = head.num_candidates
        wide = logits.double()
        scaled = wide / torch.tensor(list(head.temperatures), dtype=torch.float64).unsqueeze(1)
        sums = torch.stack([wide.logsumexp(1), scaled.logsumexp(1)], dim=1)
        return HeadResult(
            candidates=encode(order[:, :count] + start, DTYPE_I32),
            logits=encode(ordered[:, :count], DTYPE_F32),
            logsumexp=encode(sums, DTYPE_F64),
        )


def sequences_of(*requests: tuple[Sampling, int | None]) -> list[Sequence]:
    return [
        Sequence(SequenceId(number), Request("r", (1, 2), 5, sampling, logprobs=logprobs), generated=[3, 3])
        for number, (sampling, logprobs) in enumerate(requests, start=1)
    ]


def hidden_of(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


KINDS = [
    (Sampling(), None),
    (Sampling(), 3),
    (Sampling(temperature=0.7, seed=4), 2),
    (Sampling(temperature=1.0, top_k=3, seed=5), None),
    (Sampling(temperature=1e-46), None),
    (Sampling(temperature=1e300), None),
    (Sampling(temperature=30.0, top_p=0.99, seed=1), 5),
    (Sampling(presence_penalty=1.5, repetition_penalty=1.2), 4),
    (Sampling(temperature=1.0, min_p=0.2, frequency_penalty=-1, seed=2), None),
]


async def test_batch_gives_each_row_what_it_gets_alone() -> None:
    shards, hidden = FakeShards(), hidden_of(len(KINDS))
    head = Head(shards, DTYPE_F32, SIZES)  # type: ignore[arg-type]
    together = await head.choose(hidden, sequences_of(*KINDS), 9)
    assert len(shards.requests) == 2
    assert {request.step for request in shards.requests} == {9}
    for row, kind in enumerate(KINDS):
        assert await head.choose(hidden[row : row + 1], sequences_of(kind), 9) == [together[row]]


async def test_greedy_is_the_argmax_in_one_round_with_one_candidate() -> None:
    shards, hidden = FakeShards(), hidden_of(20)
    choices = await Head(shards, DTYPE_F32, SIZES).choose(hidden, sequences_of(*[(Sampling(), None)] * 20), 1)  # type: ignore[arg-type]
    assert [choice.token for choice in choices] == (hidden @ MATRIX.T).argmax(1).tolist()
    assert [request.head.num_candidates for request in shards.requests] == [1]


async def test_logprobs_are_those_of_a_softmax_without_penalties() -> None:
    hidden = hidden_of(2)
    kinds = [(Sampling(), 3), (Sampling(presence_penalty=2), 3)]
    choices = await Head(FakeShards(), DTYPE_F32, SIZES).choose(hidden, sequences_of(*kinds), 1)  # type: ignore[arg-type]
    wanted = (hidden @ MATRIX.T).log_softmax(1)
    for row, choice in enumerate(choices):
        assert choice.logprob == pytest.approx(float(wanted[row, choice.token]), abs=1e-5)
        values, ids = wanted[row].topk(3)
        assert [token for token, _ in choice.top] == ids.tolist()
        assert [value for _, value in choice.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [(Sampling(), None), (Sampling(presence_penalty=1), None)])
async def test_logits_that_are_not_finite_name_the_shard(kind: tuple[Sampling, None], bad: float) -> None:
    shards = FakeShards()
    shards.matrix = MATRIX.clone()
    shards.matrix[45, 0] = bad
    with pytest.raises(WrongResult, match="shard 1 answered logits that are NaN or infinite"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1).abs(), sequences_of(kind), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 39, 47, 99999])
async def test_candidate_of_another_shard_is_a_wrong_result(token: int) -> None:
    shards = FakeShards()
    shards.spoil[1] = HeadResult(
        candidates=encode(torch.tensor([[token]]), DTYPE_I32),
        logits=encode(torch.ones(1, 1), DTYPE_F32),
        logsumexp=encode(torch.ones(1, 2), DTYPE_F64),
    )
    with pytest.raises(WrongResult, match="shard 1 answered candidates outside its vocabulary rows 40 to 47"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1), sequences_of((Sampling(), None)), 1)  # type: ignore[arg-type]


async def test_logsumexp_of_another_precision_is_a_wrong_result() -> None:
    shards = FakeShards()
    shards.spoil[1] = HeadResult(
        candidates=encode(torch.tensor([[40]]), DTYPE_I32),
        logits=encode(torch.ones(1, 1), DTYPE_F32),
        logsumexp=encode(torch.ones(1, 2), DTYPE_F32),
    )
    with pytest.raises(WrongResult, match=r"shard 1 answered .* of dtypes \(4, 1, 1\), wanted I32, F32 and F64"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1), sequences_of((Sampling(), None)), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("spoiled", ["ids as floats", "logits in bfloat16", "worst first"])
async def test_candidates_that_are_none_are_a_wrong_result(spoiled: str) -> None:
    shards = FakeShards()
    logits = torch.tensor([[2.0, 1.0]])
    shards.spoil[1] = HeadResult(
        candidates=encode(torch.tensor([[40.0, 41.0]]), DTYPE_F32 if spoiled == "ids as floats" else DTYPE_I32),
        logits=encode(logits.flip(1) if spoiled == "worst first" else logits, DTYPE_BF16 if "bfloat" in spoiled else DTYPE_F32),
        logsumexp=encode(torch.ones(1, 2), DTYPE_F64),
    )
    with pytest.raises(WrongResult, match="shard 1 answered"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1), sequences_of((Sampling(), 1)), 1)  # type: ignore[arg-type]


async def test_all_logits_of_another_dtype_are_a_wrong_result() -> None:
    shards = FakeShards()
    shards.spoil[1] = HeadResult(logits=encode(torch.ones(1, 7), DTYPE_I32))
    with pytest.raises(WrongResult, match=r"shard 1 answered logits of torch.int32 \[1, 7\]"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1), sequences_of((Sampling(presence_penalty=1), None)), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [(Sampling(), None), (Sampling(presence_penalty=1), None)])
async def test_answer_of_another_shape_names_the_shard(kind: tuple[Sampling, None]) -> None:
    shards = FakeShards()
    shards.spoil[2] = HeadResult(logits=encode(torch.ones(1, 2), DTYPE_F32))
    with pytest.raises(WrongResult, match="shard 2 answered"):
        await Head(shards, DTYPE_F32, SIZES).choose(hidden_of(1), sequences_of(kind), 1)  # type: ignore[arg-type]
