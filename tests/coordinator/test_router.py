"""The gate against transformers' own routers."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from coordinator.models.spec import GateSpec, Scoring
from coordinator.router import route

HIDDEN, ROWS = 24, 50


def check(module: Any, gate: GateSpec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(gate.num_experts, HIDDEN, generator=generator)
    rows = torch.randn(ROWS, HIDDEN, generator=generator)
    module.weight.data.copy_(weight)
    correction = None
    if gate.corrected:
        # Some so negative that a corrected score is below 0.
        correction = torch.randn(gate.num_experts, generator=generator) * 2 - 1
        module.e_score_correction_bias.copy_(correction)
    with torch.no_grad():
        _, weights, experts = module(rows)
    found = route(functional.linear(rows, weight), gate, correction)
    assert found.experts.dtype == torch.int32
    assert found.weights.dtype == torch.float32
    for row in range(ROWS):
        wanted = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        ours = dict(zip(found.experts[row].tolist(), found.weights[row].tolist(), strict=True))
        assert ours == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 4), (5, 1)])
def test_softmax_gate_is_mixtrals(experts: int, top_k: int, seed: int) -> None:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=top_k)
    check(MixtralTopKRouter(config), GateSpec(experts, top_k, Scoring.SOFTMAX, renormalize=True), seed)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("config", "module"),
    [(Qwen2MoeConfig, Qwen2MoeTopKRouter), (Qwen3MoeConfig, Qwen3MoeTopKRouter), (OlmoeConfig, OlmoeTopKRouter)],
)
def test_softmax_gate_is_qwens_and_olmoes(config: Any, module: Any, *, renormalize: bool) -> None:
    built = config(hidden_size=HIDDEN, num_experts=16, num_experts_per_tok=4, norm_topk_prob=renormalize)
    check(module(built), GateSpec(16, 4, Scoring.SOFTMAX, renormalize=renormalize), 7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 2), (2, 1)])
def test_sigmoid_gate_is_glms_with_correction_and_groups(
    num_groups: int, top_groups: int, seed: int, *, renormalize: bool
) -> None:
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=num_groups,
        topk_group=top_groups,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    gate = GateSpec(
        16, 4, Scoring.SIGMOID, renormalize=renormalize, corrected=True, scale=2.5, num_groups=num_groups, top_groups=top_groups
    )
    check(Glm4MoeTopkRouter(config), gate, seed)


def test_expert_of_a_left_out_group_is_never_chosen() -> None:
    gate = GateSpec(8, 4, Scoring.SIGMOID, renormalize=True, corrected=True, num_groups=2, top_groups=1)
    correction = torch.tensor([-1.0] * 4 + [-5.0] * 4)
    assert sorted(route(torch.zeros(1, 8), gate, correction).experts[0].tolist()) == [0, 1, 2, 3]


def test_scores_of_zero_do_not_become_nan() -> None:
    gate = GateSpec(8, 2, Scoring.SIGMOID, renormalize=True)
    assert torch.equal(route(torch.full((1, 8), -200.0), gate, None).weights, torch.zeros(1, 2))


def test_no_rows_have_no_routes() -> None:
    found = route(torch.zeros(0, 8), GateSpec(8, 2, Scoring.SOFTMAX, renormalize=True), None)
    assert (tuple(found.experts.shape), tuple(found.weights.shape)) == ((0, 2), (0, 2))
