"""GLM-4.5, 4.6, 4.7, GLM-4.5-Air and INTELLECT-3: first layers dense, then sigmoid-gated experts beside a shared one.

Half of each head is rotated, queries and keys are normed in the large models only, q, k and v have biases and o has none.
The multi-token prediction layer (`model.layers.N` beyond the last) is not read, whether a checkpoint holds it or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.names import EXPERTS, QKV_BIASES, STANDARD
from coordinator.models.parts import decoder, dense, gqa, product, top_k
from coordinator.models.spec import GateSpec, MoeSpec, Role, Scoring
from protos.errors import ModelError
from protos.plan_pb2 import QK_NORM_HEAD, QK_NORM_NONE

if TYPE_CHECKING:
    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

ARCHITECTURES = ("Glm4MoeForCausalLM",)

NAMES = {
    **STANDARD,
    **EXPERTS,
    Role.ROUTER_CORRECTION: "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    Role.SHARED_GATE: "model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
    Role.SHARED_UP: "model.layers.{layer}.mlp.shared_experts.up_proj.weight",
    Role.SHARED_DOWN: "model.layers.{layer}.mlp.shared_experts.down_proj.weight",
}

_ROTARY_SHARE = 0.5


def describe(config: Config) -> ModelSpec:
    """Make the spec of a config."""
    dense_layers = config.integer("first_k_dense_replace", default=1, minimum=0)
    qk_norm = QK_NORM_HEAD if config.boolean("use_qk_norm", default=False) else QK_NORM_NONE
    return decoder(
        config,
        "glm4_moe",
        NAMES,
        attention=gqa(config, qk_norm=qk_norm, partial_rotary=_ROTARY_SHARE),
        feed_forward=lambda layer: dense(config) if layer < dense_layers else _experts(config),
        biases=QKV_BIASES if config.boolean("attention_bias", default=False) else (),
        norm_eps=1e-5,
    )


def _experts(config: Config) -> MoeSpec:
    width = config.integer("moe_intermediate_size")
    num_shared = config.integer("n_shared_experts", default=1, minimum=0)
    return MoeSpec(_gate(config), width, product(config, "moe_intermediate_size x n_shared_experts", width, num_shared))


def _gate(config: Config) -> GateSpec:
    num_experts = config.integer("n_routed_experts", "num_local_experts")
    groups = config.integer("n_group", default=1, maximum=num_experts)
    chosen_groups = config.integer("topk_group", default=1, maximum=groups)
    # A group is judged by its two best experts, and the chosen groups must hold enough of them.
    if num_experts % groups or (groups > 1 and num_experts // groups < 2):  # noqa: PLR2004
        raise ModelError(f"{config.source}: {num_experts} experts cannot stand in n_group = {groups} equal groups of 2 or more")
    return GateSpec(
        num_experts,
        top_k(config, num_experts // groups * chosen_groups),
        Scoring.SIGMOID,
        renormalize=config.boolean("norm_topk_prob", default=True),
        corrected=True,
        scale=config.number("routed_scaling_factor", default=1.0),
        num_groups=groups,
        top_groups=chosen_groups,
    )
