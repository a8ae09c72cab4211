"""Tiny random checkpoints of every family, written by transformers, and transformers as the oracle of what they say.

Weights have a deviation of about 0.2, norms, biases and correction biases are not trivial: greedy decoding does not
degenerate, and a tensor that is forgotten, swapped or cut wrongly changes tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logging.disable_progress_bar()
# Or else a table of the tensors that nobody reads would be printed.
logging.set_verbosity_error()

DEVIATION = 0.2
HIDDEN = 128
VOCABULARY = 512
POSITIONS = 512

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_MOE: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
_GLM: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Case:
    """One tiny model."""

    kind: type[PreTrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], None] | None = None
    """Done to the folder at the end."""
    dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `save_pretrained`."""
    max_shards: int = 8


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def use_old_spelling(directory: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def add_mtp_layer(directory: Path) -> None:
    """Add a multi-token prediction layer and rotary buffers, which checkpoints carry and nobody reads."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    count = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    last = f"model.layers.{count - 1}."
    extra = {name.replace(last, f"model.layers.{count}."): tensor.clone() for name, tensor in tensors.items() if last in name}
    extra[f"model.layers.{count}.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN)
    extra[f"model.layers.{count}.enorm.weight"] = torch.ones(HIDDEN)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors | extra, path, metadata={"format": "pt"})


CASES: dict[str, Case] = {
    "llama": Case(LlamaConfig, {"num_key_value_heads": 2}),
    "llama_tied": Case(LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_biases": Case(LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama_odd": Case(  # SmolLM2-135M's heads
        LlamaConfig,
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": None, "intermediate_size": 304},
    ),
    "llama_llama3": Case(
        LlamaConfig,
        {
            "num_key_value_heads": 2,
            **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        },
    ),
    "llama_linear": Case(LlamaConfig, {"num_key_value_heads": 2, **_rope("linear", factor=4.0)}),
    "llama_dynamic": Case(LlamaConfig, {"num_key_value_heads": 2, "max_position_embeddings": 48, **_rope("dynamic", factor=4.0)}),
    "llama_yarn": Case(
        LlamaConfig, {"num_key_value_heads": 2, **_rope("yarn", factor=4.0, original_max_position_embeddings=128)}
    ),
    "llama_yarn_mscale": Case(
        LlamaConfig,
        {
            "num_key_value_heads": 2,
            **_rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=64,
                mscale=1.0,
                mscale_all_dim=0.7,
                truncate=False,
                beta_fast=16,
            ),
        },
        rewrite=use_old_spelling,
    ),
    "llama_old_spelling": Case(LlamaConfig, {"num_key_value_heads": 2}, rewrite=use_old_spelling),
    "llama_sharded": Case(LlamaConfig, {"num_key_value_heads": 2}, save={"max_shard_size": "400KB"}),
    "llama_bf16": Case(LlamaConfig, {"num_key_value_heads": 2}, dtype=torch.bfloat16),
    "qwen3": Case(Qwen3Config, {"num_key_value_heads": 4}),
    "qwen3_moe": Case(Qwen3MoeConfig, _QWEN_MOE),
    "qwen3_moe_kv2": Case(Qwen3MoeConfig, {**_QWEN_MOE, "num_key_value_heads": 2, "norm_topk_prob": False}),
    "qwen3_moe_odd": Case(
        Qwen3MoeConfig,
        {
            **_QWEN_MOE,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 352,
            "intermediate_size": 608,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        rewrite=use_old_spelling,
    ),
    "qwen3_moe_fused": Case(Qwen3MoeConfig, _QWEN_MOE, save={"save_original_format": False}),
    "qwen3_moe_sharded": Case(Qwen3MoeConfig, {**_QWEN_MOE, "num_key_value_heads": 2}, save={"max_shard_size": "1500KB"}),
    "qwen3_moe_f16": Case(Qwen3MoeConfig, {**_QWEN_MOE, "num_key_value_heads": 2}, dtype=torch.float16),
    "mixtral": Case(MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    "mixtral_fused": Case(
        MixtralConfig,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        save={"save_original_format": False},
    ),
    "qwen2_moe": Case(
        Qwen2MoeConfig, {**_QWEN_MOE, "norm_topk_prob": False, "num_key_value_heads": 4, "shared_expert_intermediate_size": 384}
    ),
    "olmoe": Case(
        OlmoeConfig,
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "intermediate_size": 256,
            "num_key_value_heads": 4,
            "head_dim": None,
            "hidden_size": 256,
            "clip_qkv": 1.5,
        },
    ),
    "glm4_moe": Case(Glm4MoeConfig, _GLM),
    "glm4_moe_qk_norm": Case(
        Glm4MoeConfig,
        {**_GLM, "use_qk_norm": True, "routed_scaling_factor": 2.5, "n_shared_experts": 2, "num_mtp_layers": 1},
        rewrite=add_mtp_layer,
    ),
    "glm4_moe_groups": Case(Glm4MoeConfig, {**_GLM, "n_group": 4, "topk_group": 2}, rewrite=use_old_spelling),
}
"""By name."""


def make_checkpoint(name: str, directory: Path) -> None:
    """Write a tiny model as a Hugging Face folder, without a tokenizer."""
    case = CASES[name]
    settings = {key: value for key, value in {**_BASE, **case.settings}.items() if value is not None}
    config = case.kind(**settings)
    model = AutoModelForCausalLM.from_config(config)
    _randomize(model, seed=sum(name.encode()))
    model.to(case.dtype).save_pretrained(directory, **case.save)
    if case.rewrite:
        case.rewrite(directory)


def oracle(directory: Path) -> PreTrainedModel:
    """Load a checkpoint in transformers, in float32 and with the plain kernels."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            if name.endswith("norm.weight") or "layernorm" in name:
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            elif "e_score_correction_bias" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif "inv_freq" not in name:
                tensor.copy_(DEVIATION * torch.randn(tensor.shape, generator=generator))


def add_tokenizer(directory: Path) -> None:
    """Give a tiny model a byte-level tokenizer in which every id is text: 256 bytes and pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in "abcdefghijklmnop" for second in "abcdefghijklmnop"]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(first + second for first, second in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
