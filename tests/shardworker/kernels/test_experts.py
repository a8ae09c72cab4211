from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from shardworker.kernels.experts import experts
from shardworker.kernels.linear import DenseWeight


def make() -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=8, experts_implementation="eager")
    oracle = Qwen3MoeExperts(config)
    for weight in oracle.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return oracle.requires_grad_(requires_grad=False)


def route(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(rows)])
    return chosen, torch.rand(rows, 3)


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_experts_equal_transformers(rows: int) -> None:
    oracle, x, (chosen, weights) = make(), torch.randn(rows, 64), route(rows)
    found = experts(x, chosen.int(), weights, DenseWeight(oracle.gate_up_proj), DenseWeight(oracle.down_proj))
    torch.testing.assert_close(found, oracle(x, chosen, weights), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_where_the_others_go() -> None:
    oracle, x = make(), torch.randn(4, 64)
    gate_up, down = DenseWeight(oracle.gate_up_proj), DenseWeight(oracle.down_proj)
    chosen, weights = route(4)
    first = experts(x, chosen, weights, gate_up, down)[0]
    other = chosen.clone()
    other[1:] = (other[1:] + 1) % 8
    torch.testing.assert_close(experts(x, other, weights, gate_up, down)[0], first, rtol=1e-5, atol=1e-5)


def test_no_columns_give_zeros() -> None:
    gate_up, down = DenseWeight(torch.empty(8, 0, 64)), DenseWeight(torch.empty(8, 64, 0))
    assert torch.equal(experts(torch.randn(3, 64), *route(3), gate_up, down), torch.zeros(3, 64))
