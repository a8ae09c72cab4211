"""OLMoE: q and k normed over all heads together, projections clipped; softmax top-k experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import ATTENTION_BIASES, EXPERTS, STANDARD
from coordinator.models.parts import decoder, gqa, top_k
from coordinator.models.spec import GateSpec, MoeSpec, Scoring
from protos.plan_pb2 import QK_NORM_FULL

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("OlmoeForCausalLM",)

NAMES = {**STANDARD, **EXPERTS}


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    num_experts = config.integer("num_experts", "num_local_experts")
    renormalize = config.boolean("norm_topk_prob", default=False)
    gate = GateSpec(num_experts, top_k(config, num_experts), Scoring.SOFTMAX, renormalize)
    block = MoeSpec(gate, width=config.integer("intermediate_size"))
    clip_qkv = config.number("clip_qkv") if config.has("clip_qkv") else 0.0
    return decoder(
        config,
        "olmoe",
        NAMES,
        attention=gqa(config, qk_norm=QK_NORM_FULL, clip_qkv=clip_qkv),
        feed_forward=lambda _layer: block,
        biases=ATTENTION_BIASES if config.boolean("attention_bias", default=False) else (),
        norm_eps=1e-5,
    )
