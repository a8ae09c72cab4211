"""The layer loop over a fan-out that does the whole model's math in two halves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from coordinator.forward import Forward
from coordinator.models.spec import DenseSpec, GateSpec, ModelSpec, MoeSpec, Scoring
from coordinator.request import Request
from coordinator.resident import Resident, ResidentLayer
from coordinator.scheduler import Rows, Step
from coordinator.sequence import Sequence, SequenceId
from protos.errors import WrongResult
from protos.plan_pb2 import QK_NORM_FULL, QK_NORM_NONE, AttentionSpec, QkNorm
from protos.shardworker_pb2 import ExecuteRequest, ExecuteResponse
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F32
from protos.tensors import decode, encode

HIDDEN, VOCABULARY, EXPERTS = 8, 30, 4
MOE = MoeSpec(GateSpec(EXPERTS, 2, Scoring.SOFTMAX, renormalize=True), width=4, shared_width=4, shared_gated=True)
GENERATOR = torch.Generator().manual_seed(0)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR) * 0.5


def spec_of(*blocks: DenseSpec | MoeSpec, qk_norm: QkNorm = QK_NORM_NONE) -> ModelSpec:
    return ModelSpec(
        family="test",
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        context=100,
        norm_eps=1e-5,
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5, qk_norm=qk_norm),
        feed_forward=blocks,
        tied=False,
        names={},
        fused_names={},
        stop_ids=(),
    )


class FakeMesh:
    """Two shards, each with half of every product; attention is a linear map, so rows are independent."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        layers = range(spec.num_layers)
        self.attention = [(weight(HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN)) for _ in layers]
        self.dense = [(weight(HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN)) for _ in layers]
        self.experts = [(weight(EXPERTS, HIDDEN, HIDDEN), weight(EXPERTS, HIDDEN, HIDDEN)) for _ in layers]
        self.table = weight(VOCABULARY, HIDDEN)
        self.requests: list[ExecuteRequest] = []
        self.projected = torch.empty(0)
        self.resident = Resident(
            embed=lambda token_ids: self.table[torch.tensor(token_ids)],
            layers=tuple(self._resident(block) for block in spec.feed_forward),
            final_norm=weight(HIDDEN),
        )

    def _resident(self, block: DenseSpec | MoeSpec) -> ResidentLayer:
        if isinstance(block, DenseSpec):
            return ResidentLayer(weight(HIDDEN), weight(HIDDEN))
        return ResidentLayer(weight(HIDDEN), weight(HIDDEN), router=weight(EXPERTS, HIDDEN), shared_router=weight(1, HIDDEN))

    async def round(
        self, request: ExecuteRequest, result: str, num_rows: int, take: Callable[[ExecuteResponse], None]
    ) -> list[ExecuteResponse]:
        kept = ExecuteRequest()
        kept.CopyFrom(request)
        self.requests.append(kept)
        action = getattr(request, request.WhichOneof("action") or "")
        replies = [ExecuteResponse(**{result: encode(self._answer(action, shard), DTYPE_F32)}) for shard in range(2)]
        assert len(self._rows(action)) == num_rows
        for reply in replies:
            take(reply)
        return replies

    def _rows(self, action: Any) -> torch.Tensor:
        name = type(action).__name__
        if name == "Attend" and not action.HasField("hidden"):
            return self.projected
        return decode(action.hidden).float()

    def _answer(self, action: Any, shard: int) -> torch.Tensor:
        rows, name, layer = self._rows(action), type(action).__name__, action.layer
        if name == "Project":
            self.projected = rows
            return torch.full((len(rows), 2), shard + 1.0)
        if name == "Attend":
            if action.HasField("squares"):
                assert torch.equal(decode(action.squares), torch.full((len(rows), 2), 3.0))
            return rows @ self.attention[layer][shard].T
        if isinstance(self.spec.feed_forward[layer], DenseSpec):
            assert not action.HasField("experts")
            return rows @ self.dense[layer][shard].T
        chosen = self.experts[layer][shard][decode(action.experts).long()]  # [rows, k, hidden, hidden]
        routed = torch.einsum("rkoi,ri,rk->ro", chosen, rows, decode(action.expert_weights))
        return routed + decode(action.shared_weights).unsqueeze(1) * (rows @ self.dense[layer][shard].T)

    def whole(self, token_ids: list[int]) -> torch.Tensor:
        """The formula, unsharded; f32 [tokens, hidden]."""
        hidden = self.table[torch.tensor(token_ids)]
        for index, layer in enumerate(self.resident.layers):
            normed = self._norm(hidden, layer.attention_norm)
            hidden = hidden + normed @ sum(self.attention[index]).T  # type: ignore[union-attr]
            normed = self._norm(hidden, layer.feed_forward_norm)
            shared = normed @ sum(self.dense[index]).T  # type: ignore[union-attr]
            if layer.router is None:
                hidden = hidden + shared
                continue
            assert layer.shared_router is not None
            scores = (normed @ layer.router.T).softmax(-1)
            best, chosen = scores.topk(2)
            routed = torch.zeros_like(hidden)
            for row in range(len(hidden)):
                for expert, score in zip(chosen[row].tolist(), (best[row] / best[row].sum()).tolist(), strict=True):
                    routed[row] += score * (sum(half[expert] for half in self.experts[index]) @ normed[row])
            hidden = hidden + routed + (normed @ layer.shared_router.T).sigmoid() * shared
        return self._norm(hidden, self.resident.final_norm)

    @staticmethod
    def _norm(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def sequence_of(number: int, prompt: list[int], generated: list[int], computed: int) -> Sequence:
    sequence = Sequence(SequenceId(number), Request("r", tuple(prompt), 50))
    sequence.generated += generated
    sequence.num_computed = computed
    return sequence


def mixed_step() -> Step:
    decoding, chunk, whole = (
        sequence_of(5, [1, 2, 3], [4, 5], 4),
        sequence_of(6, list(range(20)), [], 4),
        sequence_of(7, [8, 9], [10], 0),
    )
    return Step(
        rows=(
            Rows(decoding, 4, 1, (), samples=True),
            Rows(chunk, 4, 5, (3, 4), samples=False),
            Rows(whole, 0, 3, (9,), samples=True),
        ),
        released=(SequenceId(2), SequenceId(3)),
    )


@pytest.mark.parametrize("blocks", [(DenseSpec(4),), (MOE,), (DenseSpec(4), MOE, MOE)], ids=["dense", "moe", "mixed"])
async def test_step_through_shards_is_the_whole_formula(blocks: tuple[DenseSpec | MoeSpec, ...]) -> None:
    mesh = FakeMesh(spec_of(*blocks))
    found = await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(mixed_step(), 11)  # type: ignore[arg-type]
    whole = mesh.whole([5, *range(4, 9), 8, 9, 10])
    assert torch.allclose(found, whole[[0, 8]], atol=1e-5)
    assert {request.step for request in mesh.requests} == {11}


async def test_batch_is_in_the_first_round_only_and_says_everything() -> None:
    mesh = FakeMesh(spec_of(DenseSpec(4), DenseSpec(4)))
    await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(mixed_step(), 1)  # type: ignore[arg-type]
    assert [request.HasField("batch") for request in mesh.requests] == [True, False, False, False]
    assert [request.WhichOneof("action") for request in mesh.requests] == ["attend", "feed_forward"] * 2
    batch = mesh.requests[0].batch
    assert [(one.sequence, one.position, one.num_rows, list(one.pages), one.prompt_tokens) for one in batch.sequences] == [
        (5, 4, 1, [], 3),
        (6, 4, 5, [3, 4], 20),
        (7, 0, 3, [9], 2),
    ]
    assert list(batch.released) == [2, 3]
    # Of the last layer's feed-forward only the rows to sample from are wanted.
    assert [decode(request.feed_forward.hidden).shape[0] for request in mesh.requests[1::2]] == [9, 2]


async def test_step_that_samples_nothing_skips_the_last_feed_forward() -> None:
    mesh = FakeMesh(spec_of(DenseSpec(4), MOE))
    step = Step((Rows(sequence_of(1, list(range(9)), [], 0), 0, 4, (0,), samples=False),), ())
    found = await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(step, 1)  # type: ignore[arg-type]
    assert tuple(found.shape) == (0, HIDDEN)
    assert [request.WhichOneof("action") for request in mesh.requests] == ["attend", "feed_forward", "attend"]


async def test_norm_over_all_heads_is_summed_over_the_shards() -> None:
    mesh = FakeMesh(spec_of(DenseSpec(4), DenseSpec(4), qk_norm=QK_NORM_FULL))
    found = await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(mixed_step(), 1)  # type: ignore[arg-type]
    assert torch.allclose(found, mesh.whole([5, *range(4, 9), 8, 9, 10])[[0, 8]], atol=1e-5)
    assert [request.WhichOneof("action") for request in mesh.requests] == ["project", "attend", "feed_forward"] * 2
    assert [request.HasField("batch") for request in mesh.requests] == [True, False, False, False, False, False]


async def test_wire_dtype_is_that_of_hidden_rows_while_routes_stay_exact() -> None:
    mesh = FakeMesh(spec_of(MOE))
    await Forward(mesh.spec, mesh.resident, mesh, DTYPE_BF16).run(mixed_step(), 1)  # type: ignore[arg-type]
    attend, feed_forward = mesh.requests[0].attend, mesh.requests[1].feed_forward
    assert (attend.hidden.dtype, feed_forward.hidden.dtype) == (DTYPE_BF16, DTYPE_BF16)
    assert (feed_forward.expert_weights.dtype, feed_forward.shared_weights.dtype) == (DTYPE_F32, DTYPE_F32)


async def test_finite_numbers_that_a_norm_cannot_take_end_the_step() -> None:
    mesh = FakeMesh(spec_of(DenseSpec(4)))
    mesh.attention[0][1][0, 0] = 1e30
    with pytest.raises(WrongResult, match="beyond what float32 holds"):
        await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(mixed_step(), 1)  # type: ignore[arg-type]


async def test_nan_from_a_shard_ends_the_step() -> None:
    mesh = FakeMesh(spec_of(DenseSpec(4)))
    mesh.attention[0][1][0, 0] = float("nan")
    with pytest.raises(WrongResult, match=r"shards \[1\]"):
        await Forward(mesh.spec, mesh.resident, mesh, DTYPE_F32).run(mixed_step(), 1)  # type: ignore[arg-type]


def test_fake_norm_is_torchs() -> None:
    rows, scale = weight(3, HIDDEN), weight(HIDDEN)
    assert torch.allclose(FakeMesh._norm(rows, scale), functional.rms_norm(rows, (HIDDEN,), scale, 1e-5), atol=1e-6)


@pytest.mark.parametrize("hidden", [8, 36, 144, 2048])
def test_norm_of_a_row_does_not_depend_on_the_others(hidden: int) -> None:
    spec = dataclasses.replace(spec_of(DenseSpec(4)), hidden=hidden)
    mesh = FakeMesh(spec_of(DenseSpec(4)))
    forward = Forward(spec, mesh.resident, mesh, DTYPE_F32)  # type: ignore[arg-type]
    rows, scale = weight(40, hidden), weight(hidden)
    together = forward._norm(rows, scale)
    assert torch.allclose(together, functional.rms_norm(rows, (hidden,), scale, spec.norm_eps), atol=1e-5, rtol=1e-5)
    for row in range(40):
        assert torch.equal(forward._norm(rows[row : row + 1], scale)[0], together[row])


@pytest.mark.parametrize("hidden", [64, 2048, 8448, 12288, 20000])
def test_a_normed_row_has_the_same_bits_whatever_stands_beside_it(hidden: int) -> None:
    spec = dataclasses.replace(spec_of(DenseSpec(4)), hidden=hidden)
    forward = Forward(spec, None, None, DTYPE_F32)  # type: ignore[arg-type]
    rows, scale = torch.randn(33, hidden), torch.rand(hidden)
    normed = forward._norm(rows, scale)
    torch.testing.assert_close(normed, functional.rms_norm(rows, (hidden,), scale, spec.norm_eps))
    for row in range(33):
        assert torch.equal(forward._norm(rows[row : row + 1], scale)[0], normed[row])
