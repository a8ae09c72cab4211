from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4MoeConfig, LlamaConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from coordinator.models.config import Config
from coordinator.models.rope import context_tokens, rope_spec
from protos.errors import ModelError
from protos.plan_pb2 import RopeSpec

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 3},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 1.1},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32, "high_freq_factor": 4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 64, "beta_slow": 2.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.37},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "truncate": True},
]


def check_bits(spec: RopeSpec, embedding: Any) -> None:
    assert torch.equal(torch.tensor(list(spec.inverse_frequencies)), embedding.inv_freq)
    assert spec.attention_factor == torch.tensor(embedding.attention_scaling, dtype=torch.float32).item()
    assert spec.rotary_dims == 2 * len(spec.inverse_frequencies)


def llama(head_dim: int, theta: float, positions: int, rope: dict[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rope_parameters={"rope_theta": theta, **rope},
        )
    )


@pytest.mark.parametrize("theta", [10000.0, 500000, 1e6])
@pytest.mark.parametrize("rope", VARIANTS, ids=lambda rope: "-".join(str(value) for value in rope.values()))
def test_frequencies_are_transformers_to_the_bit(rope: dict[str, Any], theta: float) -> None:
    config = Config("config.json", {"max_position_embeddings": 40960, "rope_parameters": {"rope_theta": theta, **rope}})
    check_bits(rope_spec(config, 128), llama(128, theta, 40960, rope))


@pytest.mark.parametrize("rope", VARIANTS, ids=lambda rope: "-".join(str(value) for value in rope.values()))
def test_old_spelling_says_the_same(rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    rest = {key: value for key, value in rope.items() if key != "rope_type"}
    old = {"max_position_embeddings": 40960, "rope_theta": 5e5, "rope_scaling": {"type": kind, **rest}}
    new = {"max_position_embeddings": 40960, "rope_parameters": {"rope_theta": 5e5, **rope}}
    assert rope_spec(Config("config.json", old), 64) == rope_spec(Config("config.json", new), 64)


@settings(max_examples=60, deadline=None)
@given(
    half=st.integers(2, 128),
    theta=st.floats(100, 1e8),
    factor=st.floats(1, 64),
    original=st.integers(32, 100_000),
    kind=st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]),
)
def test_frequencies_of_any_numbers_are_transformers(half: int, theta: float, factor: float, original: int, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = factor
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = Config("config.json", {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": theta, **rope}})
    check_bits(rope_spec(config, 2 * half), llama(2 * half, theta, 4096, rope))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("rope", [VARIANTS[0], VARIANTS[7]], ids=["default", "yarn"])
def test_partial_rotary_is_transformers(share: float, rope: dict[str, Any]) -> None:
    glm = Glm4MoeConfig(
        head_dim=64, max_position_embeddings=40960, rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": share, **rope}
    )
    values = {"max_position_embeddings": 40960, "partial_rotary_factor": share, "rope_theta": 1e6, "rope_scaling": dict(rope)}
    spec = rope_spec(Config("config.json", values), 64, partial=0.5)
    assert spec.rotary_dims == 64 * share
    check_bits(spec, Glm4MoeRotaryEmbedding(glm))


def test_dynamic_says_how_to_grow() -> None:
    values = {"max_position_embeddings": 2048, "rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 4}}
    dynamic = rope_spec(Config("config.json", values), 64).dynamic
    assert (dynamic.base, dynamic.factor, dynamic.original_positions) == (5e5, 4.0, 2048)
    assert not rope_spec(Config("config.json", {"max_position_embeddings": 2048}), 64).HasField("dynamic")


def test_theta_defaults_to_the_family() -> None:
    config = Config("config.json", {"max_position_embeddings": 2048})
    assert rope_spec(config, 64) != rope_spec(config, 64, theta=1e6)
    stated = Config("config.json", {"max_position_embeddings": 2048, "rope_theta": 1e6})
    assert rope_spec(stated, 64) == rope_spec(config, 64, theta=1e6)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 40960),
        ({"type": "default"}, 40960),
        ({"type": "linear", "factor": 4.0}, 163840),
        ({"type": "dynamic", "factor": 2.0}, 81920),
        ({"type": "llama3", **LLAMA3}, 40960),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 4.0}, 163840),
        ({"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768}, 40960),
        ({"type": "yarn", "original_max_position_embeddings": 4096}, 40960),
    ],
)
def test_context_is_stretched_by_the_factor(rope: dict[str, Any] | None, context: int) -> None:
    assert context_tokens(Config("config.json", {"max_position_embeddings": 40960, "rope_scaling": rope})) == context


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope_scaling: rope type 'longrope' is not supported, supported are default, linear",
        ),
        ({"rope_scaling": {"type": 3}}, "rope_scaling: type must be a string of up to 256 characters, found 3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "factor must be a number"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be a number > 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for each type of layer are not supported"),
        ({"rope_theta": 1}, "rope_theta must be a number > 1"),
        ({"rope_theta": -10000.0}, "rope_theta must be a number > 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported: this family rotates whole heads"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "this family rotates whole heads"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer"),
    ],
)
def test_bad_rope_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope_spec(Config("config.json", {"max_position_embeddings": 4096, **values}), 64)


def test_odd_rotary_dimensions_are_refused() -> None:
    with pytest.raises(ModelError, match="15 of a head's 30 elements would be rotated, that must be an even number > 0"):
        rope_spec(Config("config.json", {"max_position_embeddings": 4096}), 30, partial=0.5)
