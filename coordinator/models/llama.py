"""Llama (1 to 3.x, SmolLM2 and what else says so): grouped-query attention, dense feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import ATTENTION_BIASES, MLP_BIASES, STANDARD
from coordinator.models.parts import decoder, dense, gqa

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("LlamaForCausalLM",)

NAMES = STANDARD


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    attention_biases = ATTENTION_BIASES if config.boolean("attention_bias", default=False) else frozenset()
    mlp_biases = MLP_BIASES if config.boolean("mlp_bias", default=False) else frozenset()
    block = dense(config)
    return decoder(
        config,
        "llama",
        NAMES,
        attention=gqa(config),
        feed_forward=lambda _layer: block,
        biases=attention_biases | mlp_biases,
    )
