"""Mixtral: grouped-query attention; softmax top-k experts, always renormalized, under names of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import STANDARD
from coordinator.models.parts import decoder, gqa, top_k
from coordinator.models.spec import GateSpec, MoeSpec, Role, Scoring

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("MixtralForCausalLM",)

NAMES = {
    **STANDARD,
    Role.ROUTER: "model.layers.{layer}.block_sparse_moe.gate.weight",
    Role.EXPERT_GATE: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    Role.EXPERT_UP: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    Role.EXPERT_DOWN: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}

_THETA = 1e6


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    num_experts = config.integer("num_local_experts", "num_experts")
    gate = GateSpec(num_experts, top_k(config, num_experts), Scoring.SOFTMAX, renormalize=True)
    block = MoeSpec(gate, width=config.integer("intermediate_size"))
    return decoder(
        config,
        "mixtral",
        NAMES,
        attention=gqa(config, theta=_THETA),
        feed_forward=lambda _layer: block,
        norm_eps=1e-5,
        window=True,
    )
