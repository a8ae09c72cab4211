"""GGUF metadata -> config.json and generation_config.json, spelled as on the hub.

Architecture "llama" of a GGUF is both Llama (and what is built alike: SmolLM2, Mistral, TinyLlama) and Mixtral.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.gguf_import.rope import rope_scaling
from protos.errors import ModelError

if TYPE_CHECKING:
    from coordinator.gguf_import.header import GgufFile

ARCHITECTURE = "llama"

TORCH_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}

_UNSUPPORTED = (
    "llama.attention.scale",
    "llama.attention.clamp_kqv",
    "llama.embedding_scale",
    "llama.residual_scale",
    "llama.logit_scale",
    "llama.expert_shared_count",
    "llama.expert_weights_scale",
)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of the model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    """Columns of a feed-forward block, or of one expert."""
    vocabulary: int
    context: int
    experts: int
    """0 in a dense model."""
    chosen_experts: int


def read_dimensions(file: GgufFile) -> Dimensions:
    """Read the sizes.

    Raises:
        ModelError: another architecture, sizes that are missing or contradict each other, or a variant that is not supported.

    """
    metadata = file.metadata
    architecture = metadata.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelError(
            f"GGUF architecture {architecture!r} is not supported, only {ARCHITECTURE!r}: get the model's safetensors"
        )
    if asked := [key for key in _UNSUPPORTED if key in metadata]:
        raise ModelError(f"GGUF: {asked[0]} is set, which is not supported: get the model's safetensors")
    hidden, heads = metadata.integer("llama.embedding_length"), metadata.same("llama.attention.head_count")
    if not hidden or not heads:
        raise ModelError(f"GGUF: a model needs a hidden size and heads, found {hidden} and {heads}")
    head_dim = metadata.integer("llama.attention.key_length", hidden // heads)
    context = metadata.integer("llama.context_length")
    dimensions = Dimensions(
        layers=metadata.integer("llama.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=metadata.same("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        width=metadata.same("llama.feed_forward_length"),
        vocabulary=_vocabulary(file, hidden),
        # Beyond its window a sliding model would be another one; inside it, it is Llama.
        context=min(context, metadata.integer("llama.attention.sliding_window", 0) or context),
        experts=metadata.integer("llama.expert_count", 0),
        chosen_experts=metadata.integer("llama.expert_used_count", 0),
    )
    _check(file, dimensions)
    return dimensions


def model_config(file: GgufFile, dimensions: Dimensions, dtype: str) -> dict[str, object]:
    """Make config.json; `dtype` is "f32", "bf16" or "f16"."""
    metadata = file.metadata
    theta = metadata.number("llama.rope.freq_base", 10000.0)
    config: dict[str, object] = {
        "architectures": ["MixtralForCausalLM" if dimensions.experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if dimensions.experts else "llama",
        "hidden_size": dimensions.hidden,
        "num_hidden_layers": dimensions.layers,
        "num_attention_heads": dimensions.heads,
        "num_key_value_heads": dimensions.kv_heads,
        "head_dim": dimensions.head_dim,
        "intermediate_size": dimensions.width,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": dimensions.context,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, theta, dimensions.head_dim),
        "vocab_size": dimensions.vocabulary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_cache": True,
    }
    if dimensions.experts:
        config |= {
            "num_local_experts": dimensions.experts,
            "num_experts_per_tok": dimensions.chosen_experts,
            "sliding_window": None,
        }
    else:
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    return config | _token_ids(file)


def generation_config(file: GgufFile) -> dict[str, object]:
    """Make generation_config.json: the tokens that begin and end a text."""
    ids = _token_ids(file)
    eos, turn = ids.get("eos_token_id"), file.metadata.optional_integer("tokenizer.ggml.eot_token_id")
    if turn is not None and eos is not None and turn != eos:
        ids["eos_token_id"] = [eos, turn]
    return ids


def _token_ids(file: GgufFile) -> dict[str, object]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: file.metadata.optional_integer(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _vocabulary(file: GgufFile, hidden: int) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:  # noqa: PLR2004  # a matrix
        found = "none" if embedding is None else list(embedding.shape)
        raise ModelError(f"GGUF: token_embd.weight must be [vocabulary, {hidden}], found {found}")
    return embedding.shape[0]


def _check(file: GgufFile, dimensions: Dimensions) -> None:
    metadata, head_dim = file.metadata, dimensions.head_dim
    if not dimensions.kv_heads or dimensions.heads % dimensions.kv_heads:
        raise ModelError(f"GGUF: {dimensions.kv_heads} kv heads do not divide {dimensions.heads} heads")
    rotary = metadata.integer("llama.rope.dimension_count", head_dim)
    values = metadata.integer("llama.attention.value_length", head_dim)
    if head_dim == 0 or head_dim % 2 or (rotary, values) != (head_dim, head_dim):
        raise ModelError(f"GGUF: heads of {head_dim} with {rotary} rotary dimensions and values of {values} are not supported")
    if dimensions.experts and not 0 < dimensions.chosen_experts <= dimensions.experts:
        raise ModelError(f"GGUF: {dimensions.chosen_experts} of {dimensions.experts} experts cannot be chosen")
    if not dimensions.layers or not dimensions.context or not dimensions.width:
        raise ModelError("GGUF: a model needs layers, a context and a feed-forward width, found 0 of one of them")
