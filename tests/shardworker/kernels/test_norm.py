from __future__ import annotations

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from shardworker.kernels.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_qwen3(dtype: torch.dtype) -> None:
    oracle = Qwen3MoeRMSNorm(16, eps=1e-5).to(dtype)
    torch.nn.init.normal_(oracle.weight)
    x = (torch.randn(5, 3, 16) * 3).to(dtype)
    assert torch.equal(rms_norm(x, oracle.weight.detach(), 1e-5), oracle(x).detach())


def test_rms_norm_with_a_mean_from_elsewhere_equals_olmoe() -> None:
    oracle = OlmoeRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(oracle.weight)
    x = torch.randn(5, 48)
    mean = x.square().mean(-1)[:, None, None]
    weight = oracle.weight.detach().view(3, 16)
    parts = [rms_norm(x.view(5, 3, 16)[:, h : h + 1], weight[h : h + 1], 1e-5, mean) for h in range(3)]
    torch.testing.assert_close(torch.cat(parts, 1).view(5, 48), oracle(x).detach(), rtol=1e-6, atol=1e-6)
