"""Each family against real public configs, and against transformers on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.models.config import Config, read_config
from coordinator.models.layout import has_own_head, num_parameters, wanted_tensors
from coordinator.models.registry import describe
from coordinator.models.spec import DenseSpec, ModelSpec, MoeSpec, Role, Scoring
from protos import plan_pb2 as pb
from protos.errors import ModelError
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "data" / "configs"


def public(name: str, **changes: Any) -> Config:
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    return Config("config.json", {key: value for key, value in {**values, **changes}.items() if value is not ...})


def tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    wanted = wanted_tensors(spec, own_head=has_own_head(spec, None))
    return {name: tensor.shape for tensor in wanted for name in tensor.names()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As the hub's pages state them; INTELLECT-3's files hold no multi-token prediction layer.
        ("intellect-3", 106_852_251_264),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("olmoe-1b-7b", 6_919_161_856),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameters_of_public_models(name: str, parameters: int) -> None:
    spec = describe(public(name))
    assert num_parameters(spec, own_head=has_own_head(spec, None)) == parameters


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [
        ("intellect-3", "model.layers.0.mlp.gate_proj.weight", (10944, 4096)),
        ("intellect-3", "model.layers.1.mlp.experts.127.down_proj.weight", (4096, 1408)),
        ("intellect-3", "model.layers.45.mlp.shared_experts.up_proj.weight", (1408, 4096)),
        ("intellect-3", "model.layers.45.mlp.gate.e_score_correction_bias", (128,)),
        ("intellect-3", "model.layers.45.self_attn.q_proj.bias", (12288,)),
        ("intellect-3", "lm_head.weight", (151552, 4096)),
        ("qwen3-30b-a3b", "model.layers.47.self_attn.q_norm.weight", (128,)),
        ("qwen3-30b-a3b", "model.layers.0.mlp.experts.0.up_proj.weight", (768, 2048)),
        ("qwen3-30b-a3b", "model.layers.0.mlp.gate.weight", (128, 2048)),
        ("mixtral-8x7b", "model.layers.31.block_sparse_moe.experts.7.w2.weight", (4096, 14336)),
        ("mixtral-8x7b", "model.layers.31.block_sparse_moe.gate.weight", (8, 4096)),
        ("qwen1.5-moe-a2.7b", "model.layers.23.mlp.shared_expert_gate.weight", (1, 2048)),
        ("qwen1.5-moe-a2.7b", "model.layers.23.mlp.shared_expert.down_proj.weight", (2048, 5632)),
        ("qwen1.5-moe-a2.7b", "model.layers.0.self_attn.k_proj.bias", (2048,)),
        ("olmoe-1b-7b", "model.layers.15.self_attn.k_norm.weight", (2048,)),
        ("llama-3.1-8b", "model.layers.31.self_attn.v_proj.weight", (1024, 4096)),
        ("smollm2-135m", "model.embed_tokens.weight", (49152, 576)),
    ],
)
def test_names_and_shapes_of_public_models(model: str, name: str, shape: tuple[int, ...]) -> None:
    assert tensors(describe(public(model)))[name] == shape


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("intellect-3", "model.layers.0.self_attn.o_proj.bias"),
        ("intellect-3", "model.layers.1.self_attn.q_norm.weight"),
        ("intellect-3", "model.layers.0.mlp.gate.weight"),
        ("intellect-3", "model.layers.46.input_layernorm.weight"),
        ("qwen1.5-moe-a2.7b", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3-30b-a3b", "model.layers.0.mlp.gate_proj.weight"),
        ("smollm2-135m", "lm_head.weight"),
    ],
)
def test_names_that_public_models_lack(model: str, name: str) -> None:
    assert name not in tensors(describe(public(model)))


def test_intellect_3_is_described() -> None:
    spec = describe(public("intellect-3"))
    attention = spec.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (96, 8, 128)
    assert attention.rope.rotary_dims == 64
    assert attention.qk_norm == pb.QK_NORM_NONE
    assert spec.feed_forward[0] == DenseSpec(10944)
    moe = spec.feed_forward[1]
    assert isinstance(moe, MoeSpec)
    assert (moe.width, moe.shared_width, moe.shared_gated) == (1408, 1408, False)
    gate = moe.gate
    assert (gate.num_experts, gate.top_k, gate.scoring, gate.renormalize) == (128, 8, Scoring.SIGMOID, True)
    assert gate.corrected
    assert set(spec.feed_forward[1:]) == {moe}
    assert spec.stop_ids == (151334, 151329)
    assert spec.context == 131072
    assert spec.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("model", "renormalize", "top_k", "shared_gated"),
    [
        ("qwen3-30b-a3b", True, 8, False),
        ("mixtral-8x7b", True, 2, False),
        ("qwen1.5-moe-a2.7b", False, 4, True),
        ("olmoe-1b-7b", False, 8, False),
    ],
)
def test_softmax_gates_are_described(model: str, *, renormalize: bool, top_k: int, shared_gated: bool) -> None:
    moe = describe(public(model)).feed_forward[0]
    assert isinstance(moe, MoeSpec)
    assert moe.gate.scoring is Scoring.SOFTMAX
    assert (moe.gate.renormalize, moe.gate.top_k, moe.shared_gated) == (renormalize, top_k, shared_gated)
    assert not moe.gate.corrected


def test_qwen_layers_are_moe_by_step_and_list() -> None:
    spec = describe(public("qwen3-30b-a3b", num_hidden_layers=8, decoder_sparse_step=3, mlp_only_layers=[5]))
    assert [isinstance(block, MoeSpec) for block in spec.feed_forward] == [False, False, True, False, False, False, False, False]
    assert Role.GATE in spec.names


def test_qwen_without_experts_is_dense() -> None:
    spec = describe(public("qwen3-30b-a3b", num_experts=0))
    assert set(spec.feed_forward) == {DenseSpec(6144)}
    assert Role.ROUTER not in spec.names


def test_glm_355b_differs_by_numbers_only() -> None:
    spec = describe(
        public("intellect-3", use_qk_norm=True, first_k_dense_replace=3, routed_scaling_factor=2.5, n_routed_experts=160)
    )
    assert spec.attention.qk_norm == pb.QK_NORM_HEAD
    assert [isinstance(block, DenseSpec) for block in spec.feed_forward[:4]] == [True, True, True, False]
    moe = spec.feed_forward[3]
    assert isinstance(moe, MoeSpec)
    assert (moe.gate.scale, moe.gate.num_experts) == (2.5, 160)


def test_unused_window_is_no_obstacle() -> None:
    assert describe(public("qwen1.5-moe-a2.7b", sliding_window=4096)).family == "qwen2_moe"
    assert describe(public("mixtral-8x7b", sliding_window=32768)).family == "mixtral"
    assert describe(public("qwen3-8b", use_sliding_window=True, sliding_window=4096)).family == "qwen3"
    layer_types = ["full_attention"] * 36
    assert describe(public("qwen3-8b", layer_types=layer_types, sliding_window=4096)).family == "qwen3"


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.1-8b", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_multiplier": None}),
    ("llama-3.1-8b", {"logits_scaling": 1, "residual_multiplier": 1.0, "embedding_multiplier": 1.0}),
    ("llama-3.1-8b", {"layer_types": ["full_attention"] * 32, "sliding_window": 4096}),
    ("llama-3.1-8b", {"use_sliding_window": False, "sliding_window": 4096}),
    ("llama-3.1-8b", {"scoring_func": "sigmoid"}),  # it has no experts
    ("qwen3-30b-a3b", {"scoring_func": "softmax"}),
    ("intellect-3", {"scoring_func": "sigmoid", "sliding_window": None, "quantization_config": None}),
]


@pytest.mark.parametrize(("model", "changes"), HARMLESS, ids=lambda value: str(value)[:60])
def test_keys_that_change_nothing_are_accepted(model: str, changes: dict[str, Any]) -> None:
    assert describe(public(model, **changes)) == describe(public(model))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-3.1-8b", {"logit_scale": 0.0625}, "logit_scale = 0.0625 is not supported: logits are taken as they are"),
    ("qwen3-30b-a3b", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section = "),
    ("llama-3.1-8b", {"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported: supported are silu, swish'),
    (
        "mixtral-8x7b",
        {"sliding_window": 4096},
        "sliding_window = 4096 is not supported: attention covers the whole context of 32768",
    ),
    ("qwen3-30b-a3b", {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}, "sliding_window = 4096"),
    ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36}, "layer_types = .* is not supported: only layers of full_attention"),
    (
        "llama-3.1-8b",
        {"quantization_config": {"quant_method": "awq"}},
        "quant_method 'awq' is not supported: take the unquantized",
    ),
    ("llama-3.1-8b", {"quantization_config": {"bits": 4}}, "quant_method 'unknown' is not supported"),
    ("llama-3.1-8b", {"num_key_value_heads": 5}, "num_attention_heads must be a multiple of num_key_value_heads, found 32 and 5"),
    (
        "llama-3.1-8b",
        {"num_attention_heads": 33, "num_key_value_heads": 33},
        "hidden_size must be a multiple of num_attention_heads",
    ),
    ("llama-3.1-8b", {"hidden_size": ...}, "hidden_size is missing, it must be an integer"),
    ("llama-3.1-8b", {"num_hidden_layers": 10**9}, r"num_hidden_layers must be an integer in \[1, 4096\], found 1000000000"),
    (
        "llama-3.1-8b",
        {"num_attention_heads": 2**20, "head_dim": 2**20},
        "num_attention_heads x head_dim = 1099511627776 is too large",
    ),
    ("llama-3.1-8b", {"rms_norm_eps": 0}, "rms_norm_eps must be a number > 0"),
    ("llama-3.1-8b", {"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number > 0"),
    ("llama-3.1-8b", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ("llama-3.1-8b", {"attention_bias": 1}, "attention_bias must be true or false, found 1"),
    ("llama-3.1-8b", {"vocab_size": -5}, "vocab_size must be an integer"),
    ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, r"num_experts_per_tok must be an integer in \[1, 128\], found 129"),
    ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    ("intellect-3", {"n_group": 3}, "128 experts cannot stand in n_group = 3 equal groups"),
    ("intellect-3", {"n_group": 8, "topk_group": 9}, r"topk_group must be an integer in \[1, 8\]"),
    ("intellect-3", {"n_group": 32, "topk_group": 1}, r"num_experts_per_tok must be an integer in \[1, 4\], found 8"),
    ("intellect-3", {"moe_intermediate_size": 2**20, "n_shared_experts": 2**20}, "n_shared_experts = 1099511627776 is too large"),
    ("olmoe-1b-7b", {"clip_qkv": -1.0}, "clip_qkv must be a number > 0"),
    (
        "llama-3.1-8b",
        {"attn_logit_softcapping": 50.0},
        r"^config\.json: attn_logit_softcapping = 50.0 is not supported: attention",
    ),
    ("qwen3-8b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    ("llama-3.1-8b", {"logits_scaling": 8.0}, "logits_scaling = 8.0 is not supported: logits are taken as they are"),
    ("mixtral-8x7b", {"residual_multiplier": 0.22}, "residual_multiplier = 0.22 is not supported"),
    ("llama-3.1-8b", {"embedding_multiplier": 12}, "embedding_multiplier = 12 is not supported"),
    ("llama-3.1-8b", {"embedding_multiplier": True}, "embedding_multiplier = true is not supported"),
    ("intellect-3", {"attention_multiplier": 0.015625}, "attention_multiplier = 0.015625 is not supported"),
    ("llama-3.1-8b", {"layer_types": ["full_attention"] * 31 + ["chunked_attention"]}, "layer_types = .* is not supported"),
    ("intellect-3", {"layer_types": ["sliding_attention"] * 46}, "layer_types = .* is not supported"),
    ("llama-3.1-8b", {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ("olmoe-1b-7b", {"sliding_window": 512}, "sliding_window = 512 is not supported"),
    (
        "llama-3.1-8b",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        r"^config\.json: rope_scaling: mrope_section = \[16, 24, 24\] is not supported",
    ),
    ("qwen3-8b", {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]}}, "rope_parameters: mrope_section"),
    ("qwen3-30b-a3b", {"scoring_func": "sigmoid"}, 'scoring_func = "sigmoid" is not supported: .* by softmax'),
    ("intellect-3", {"scoring_func": "softmax"}, 'scoring_func = "softmax" is not supported: .* by sigmoid'),
    ("qwen3-8b", {"torch_dtype": "float8_e4m3fn"}, 'torch_dtype = "float8_e4m3fn" is not supported: take the unquantized'),
    ("qwen3-8b", {"dtype": "torch.float8_e5m2"}, 'dtype = "torch.float8_e5m2" is not supported'),
    ("qwen3-8b", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not supported"),
]


@pytest.mark.parametrize(("model", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(model: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe(public(model, **changes))


@pytest.mark.parametrize("name", list(tiny.CASES))
def test_spec_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    tiny.make_checkpoint(name, tmp_path)
    config = read_config(tmp_path)
    spec = describe(config)
    model: Any = tiny.oracle(tmp_path)
    attention = model.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(spec.attention.scale, rel=1e-7)
    assert attention.head_dim == spec.attention.head_dim
    assert attention.num_key_value_groups == spec.attention.num_heads // spec.attention.num_kv_heads
    assert model.model.norm.variance_epsilon == spec.norm_eps
    assert model.config.tie_word_embeddings == spec.tied
    assert list(model.model.rotary_emb.inv_freq) == list(spec.attention.rope.inverse_frequencies)
    for layer, block in zip(model.model.layers, spec.feed_forward, strict=True):
        assert hasattr(layer.mlp, "experts") == isinstance(block, MoeSpec)
        if isinstance(block, MoeSpec):
            assert layer.mlp.experts.gate_up_proj.shape == (block.gate.num_experts, 2 * block.width, spec.hidden)
            assert layer.mlp.gate.top_k == block.gate.top_k
