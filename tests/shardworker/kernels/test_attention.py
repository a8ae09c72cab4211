from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding

from shardworker.kernels.attention import attention, causal_mask, head_groups
from shardworker.kernels.norm import rms_norm
from shardworker.kernels.rope import rotate, rotation


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, readers: list[int], scale: float) -> torch.Tensor:
    rows, length = q.shape[0], k.shape[1]
    blocked = torch.ones(rows, length).triu(length - rows + 1).bool()
    heads = [
        ((q[:, h] @ k[kv].T * scale).masked_fill(blocked, float("-inf")).softmax(-1)) @ v[kv] for h, kv in enumerate(readers)
    ]
    return torch.stack(heads, 1)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_head_groups_cover_each_query_head_once_with_its_kv_head(num_kv_heads: int, per_kv: int, data: st.DataObject) -> None:
    num_heads = num_kv_heads * per_kv
    start = data.draw(st.integers(0, num_heads - 1))
    heads = range(start, data.draw(st.integers(start + 1, num_heads)))
    kv_heads = range(heads[0] // per_kv, heads[-1] // per_kv + 1)
    readers: dict[int, int] = {}
    groups = head_groups([head // per_kv - kv_heads[0] for head in heads])
    for group in groups:
        for query in range(group.queries.start, group.queries.stop):
            assert query not in readers
            readers[query] = group.kv_heads.start + (query - group.queries.start) // group.queries_per_kv_head
    assert readers == {head - start: head // per_kv - kv_heads.start for head in heads}
    assert len(groups) <= 3


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9)])
@pytest.mark.parametrize("heads", [range(9), range(5, 8), range(1, 6), range(3, 4)])
def test_attention_over_uneven_groups_equals_the_formula(rows: int, length: int, heads: range) -> None:
    kv_heads = range(heads[0] // 3, heads[-1] // 3 + 1)
    q = torch.randn(rows, len(heads), 16)
    k, v = torch.randn(2, len(kv_heads), length, 16)
    mask = causal_mask(length - rows, rows, torch.float32, q.device) if 1 < rows < length else None
    found = attention(q, k, v, head_groups([h // 3 - kv_heads[0] for h in heads]), 0.3, mask)
    torch.testing.assert_close(found, plain(q, k, v, [h // 3 - kv_heads[0] for h in heads], 0.3), rtol=1e-5, atol=1e-5)


def test_attention_equals_qwen3_moe() -> None:
    config = Qwen3MoeConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, attn_implementation="eager"
    )
    oracle = Qwen3MoeAttention(config, 0).eval()
    for weight in oracle.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x = torch.randn(7, 64)
    embed = Qwen3MoeRotaryEmbedding(config)
    positions = torch.arange(7)
    mask = causal_mask(0, 7, torch.float32, x.device)[None, None]
    with torch.inference_mode():
        wanted, _ = oracle(x[None], embed(x, positions[None]), mask)
        q, k, v = (layer(x).view(7, -1, 32) for layer in (oracle.q_proj, oracle.k_proj, oracle.v_proj))
        tables = rotation(positions, embed.inv_freq, embed.attention_scaling, torch.float32)
        q = rotate(rms_norm(q, oracle.q_norm.weight, config.rms_norm_eps), tables)
        k = rotate(rms_norm(k, oracle.k_norm.weight, config.rms_norm_eps), tables)
        groups = head_groups([0, 0, 1, 1])
        mixed = attention(q, k.transpose(0, 1), v.transpose(0, 1), groups, oracle.scaling, None)
        torch.testing.assert_close(oracle.o_proj(mixed.reshape(7, -1)), wanted[0], rtol=1e-5, atol=1e-5)
