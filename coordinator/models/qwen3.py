"""Qwen3, dense: grouped-query attention with q and k norms on each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import ATTENTION_BIASES, STANDARD
from coordinator.models.parts import decoder, dense, gqa, num_layers
from protos.plan_pb2 import QK_NORM_HEAD

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("Qwen3ForCausalLM",)

NAMES = STANDARD

_HEAD_DIM = 128
_FULL_LAYERS = 28


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    # Layers from `max_window_layers` on see the window, if it is switched on.
    full_layers = config.integer("max_window_layers", default=_FULL_LAYERS, minimum=0)
    window = config.boolean("use_sliding_window", default=False) and full_layers < num_layers(config)
    block = dense(config)
    return decoder(
        config,
        "qwen3",
        NAMES,
        attention=gqa(config, qk_norm=QK_NORM_HEAD, head_dim=_HEAD_DIM),
        feed_forward=lambda _layer: block,
        biases=ATTENTION_BIASES if config.boolean("attention_bias", default=False) else (),
        window=window,
    )
