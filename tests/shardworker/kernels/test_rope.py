from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from shardworker.kernels.rope import dynamic_frequencies, rotate, rotation

ROWS, HEADS, DIM = 40, 3, 16


def embedding(rope: dict[str, Any], **options: Any) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        head_dim=DIM,
        rope_parameters={"rope_theta": 10000.0, **rope},
        **options,
    )
    return LlamaRotaryEmbedding(config)


VARIANTS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("rope", VARIANTS, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(rope: dict[str, Any], dtype: torch.dtype) -> None:
    oracle = embedding(rope)
    q = torch.randn(ROWS, HEADS, DIM).to(dtype)
    positions = torch.arange(ROWS) + 5
    cos, sin = oracle(q, positions[None])
    wanted, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    tables = rotation(positions, oracle.inv_freq, oracle.attention_scaling, dtype)
    assert torch.equal(rotate(q, tables), wanted[0].transpose(0, 1))


def test_partial_rotation_leaves_the_other_dimensions() -> None:
    oracle = embedding({"rope_type": "default"})
    q = torch.randn(ROWS, HEADS, 2 * DIM)
    tables = rotation(torch.arange(ROWS), oracle.inv_freq, 1.0, torch.float32)
    turned = rotate(q, tables)
    assert torch.equal(turned[..., DIM:], q[..., DIM:])
    assert torch.equal(turned[..., :DIM], rotate(q[..., :DIM].contiguous(), tables))


@pytest.mark.parametrize("length", [4, 16, 17, 40])
def test_dynamic_frequencies_equal_transformers(length: int) -> None:
    oracle = embedding({"rope_type": "dynamic", "factor": 3.0}, max_position_embeddings=16)
    oracle(torch.zeros(1), torch.arange(length)[None])
    found = dynamic_frequencies(torch.tensor([length]), 10000.0, 3.0, 16, DIM)
    torch.testing.assert_close(found[0], oracle.inv_freq, rtol=1e-6, atol=0)
