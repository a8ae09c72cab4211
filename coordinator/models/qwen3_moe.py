"""Qwen3-MoE: grouped-query attention with q and k norms on each head; softmax top-k experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import ATTENTION_BIASES, EXPERTS, STANDARD
from coordinator.models.parts import decoder, gqa, qwen_moe_layers, top_k
from coordinator.models.spec import GateSpec, MoeSpec, Scoring
from protos.plan_pb2 import QK_NORM_HEAD

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("Qwen3MoeForCausalLM",)

NAMES = {**STANDARD, **EXPERTS}


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    return decoder(
        config,
        "qwen3_moe",
        NAMES,
        attention=gqa(config, qk_norm=QK_NORM_HEAD),
        feed_forward=qwen_moe_layers(config, lambda: _experts(config)),
        biases=ATTENTION_BIASES if config.boolean("attention_bias", default=False) else (),
        window=config.boolean("use_sliding_window", default=False),
    )


def _experts(config: Config) -> MoeSpec:
    num_experts = config.integer("num_experts", "num_local_experts")
    renormalize = config.boolean("norm_topk_prob", default=False)
    gate = GateSpec(num_experts, top_k(config, num_experts), Scoring.SOFTMAX, renormalize)
    return MoeSpec(gate, width=config.integer("moe_intermediate_size"))
