"""Qwen2-MoE and Qwen1.5-MoE: qkv biases; softmax top-k experts beside a shared expert with a sigmoid gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import EXPERTS, QKV_BIASES, STANDARD
from coordinator.models.parts import decoder, gqa, qwen_moe_layers, top_k
from coordinator.models.spec import GateSpec, MoeSpec, Role, Scoring

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("Qwen2MoeForCausalLM",)

NAMES = {
    **STANDARD,
    **EXPERTS,
    Role.SHARED_GATE: "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
    Role.SHARED_UP: "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
    Role.SHARED_DOWN: "model.layers.{layer}.mlp.shared_expert.down_proj.weight",
    Role.SHARED_ROUTER: "model.layers.{layer}.mlp.shared_expert_gate.weight",
}


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    return decoder(
        config,
        "qwen2_moe",
        NAMES,
        attention=gqa(config),
        feed_forward=qwen_moe_layers(config, lambda: _experts(config)),
        biases=QKV_BIASES if config.boolean("qkv_bias", default=True) else (),
        window=config.boolean("use_sliding_window", default=False),
    )


def _experts(config: Config) -> MoeSpec:
    num_experts = config.integer("num_experts", "num_local_experts")
    renormalize = config.boolean("norm_topk_prob", default=False)
    return MoeSpec(
        GateSpec(num_experts, top_k(config, num_experts), Scoring.SOFTMAX, renormalize),
        width=config.integer("moe_intermediate_size"),
        shared_width=config.integer("shared_expert_intermediate_size"),
        shared_gated=True,
    )
