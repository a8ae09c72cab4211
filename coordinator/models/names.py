"""Checkpoint names of tensors as the hub's models have them; families take these and change what is particular to them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator.models.spec import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAYER = "model.layers.{layer}."

STANDARD: Mapping[Role, str] = MappingProxyType(
    {
        Role.EMBEDDING: "model.embed_tokens.weight",
        Role.FINAL_NORM: "model.norm.weight",
        Role.HEAD: "lm_head.weight",
        Role.ATTENTION_NORM: _LAYER + "input_layernorm.weight",
        Role.Q: _LAYER + "self_attn.q_proj.weight",
        Role.K: _LAYER + "self_attn.k_proj.weight",
        Role.V: _LAYER + "self_attn.v_proj.weight",
        Role.O: _LAYER + "self_attn.o_proj.weight",
        Role.Q_BIAS: _LAYER + "self_attn.q_proj.bias",
        Role.K_BIAS: _LAYER + "self_attn.k_proj.bias",
        Role.V_BIAS: _LAYER + "self_attn.v_proj.bias",
        Role.O_BIAS: _LAYER + "self_attn.o_proj.bias",
        Role.Q_NORM: _LAYER + "self_attn.q_norm.weight",
        Role.K_NORM: _LAYER + "self_attn.k_norm.weight",
        Role.FEED_FORWARD_NORM: _LAYER + "post_attention_layernorm.weight",
        Role.GATE: _LAYER + "mlp.gate_proj.weight",
        Role.UP: _LAYER + "mlp.up_proj.weight",
        Role.DOWN: _LAYER + "mlp.down_proj.weight",
        Role.GATE_BIAS: _LAYER + "mlp.gate_proj.bias",
        Role.UP_BIAS: _LAYER + "mlp.up_proj.bias",
        Role.DOWN_BIAS: _LAYER + "mlp.down_proj.bias",
    }
)
"""Names of a dense decoder as on the hub."""

EXPERTS: Mapping[Role, str] = MappingProxyType(
    {
        Role.ROUTER: _LAYER + "mlp.gate.weight",
        Role.EXPERT_GATE: _LAYER + "mlp.experts.{expert}.gate_proj.weight",
        Role.EXPERT_UP: _LAYER + "mlp.experts.{expert}.up_proj.weight",
        Role.EXPERT_DOWN: _LAYER + "mlp.experts.{expert}.down_proj.weight",
    }
)
"""Names of routed experts as most of the hub's checkpoints have them."""

FUSED: Mapping[Role, str] = MappingProxyType(
    {
        Role.ROUTER: _LAYER + "mlp.gate.weight",
        Role.FUSED_GATE_UP: _LAYER + "mlp.experts.gate_up_proj",
        Role.FUSED_DOWN: _LAYER + "mlp.experts.down_proj",
    }
)
"""Names that transformers 5 gives to experts when it saves its own layout; the router moves there in Mixtral only."""

QKV_BIASES = frozenset({Role.Q_BIAS, Role.K_BIAS, Role.V_BIAS})
ATTENTION_BIASES = QKV_BIASES | {Role.O_BIAS}
MLP_BIASES = frozenset({Role.GATE_BIAS, Role.UP_BIAS, Role.DOWN_BIAS})
