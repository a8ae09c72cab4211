"""What a model is, as data: the result of reading a `config.json`, and the vocabulary in which a family is described.

Nothing here knows a family, a file or a shard. What workers need to know of a model (attention, rope) is the message that
goes to them (`protos/plan.proto`); the rest is frozen dataclasses.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.plan_pb2 import AttentionSpec


class Role(enum.Enum):
    """What a checkpoint tensor is for. Each role's tensor has one shape rule and one way to be cut (`coordinator.planning`)."""

    EMBEDDING = enum.auto()  # [vocabulary, hidden]
    FINAL_NORM = enum.auto()  # [hidden]
    HEAD = enum.auto()  # [vocabulary, hidden]

    ATTENTION_NORM = enum.auto()  # [hidden], before attention
    Q = enum.auto()  # [heads * head_dim, hidden]
    K = enum.auto()  # [kv_heads * head_dim, hidden]
    V = enum.auto()
    O = enum.auto()  # noqa: E741  # [hidden, heads * head_dim]
    Q_BIAS = enum.auto()
    K_BIAS = enum.auto()
    V_BIAS = enum.auto()
    O_BIAS = enum.auto()  # [hidden]
    Q_NORM = enum.auto()  # [head_dim], or [heads * head_dim] with QK_NORM_FULL
    K_NORM = enum.auto()

    FEED_FORWARD_NORM = enum.auto()  # [hidden], before the feed-forward block
    GATE = enum.auto()  # dense block: [width, hidden]
    UP = enum.auto()
    DOWN = enum.auto()  # [hidden, width]
    GATE_BIAS = enum.auto()
    UP_BIAS = enum.auto()
    DOWN_BIAS = enum.auto()

    ROUTER = enum.auto()  # [experts, hidden]
    ROUTER_CORRECTION = enum.auto()  # [experts]: added to the scores for choosing only
    EXPERT_GATE = enum.auto()  # each expert: [width, hidden]
    EXPERT_UP = enum.auto()
    EXPERT_DOWN = enum.auto()  # [hidden, width]
    FUSED_GATE_UP = enum.auto()  # all experts in one: [experts, 2 * width, hidden], gate's rows first
    FUSED_DOWN = enum.auto()  # [experts, hidden, width]
    SHARED_GATE = enum.auto()  # shared expert: as a dense block
    SHARED_UP = enum.auto()
    SHARED_DOWN = enum.auto()
    SHARED_ROUTER = enum.auto()  # [1, hidden]: sigmoid weight of the shared expert


class Scoring(enum.Enum):
    """How a gate turns router logits into scores."""

    SOFTMAX = enum.auto()  # over all experts (Mixtral, Qwen MoE, OLMoE)
    SIGMOID = enum.auto()  # each expert by itself (GLM-4.5, DeepSeek-V3)


@dataclass(frozen=True, slots=True)
class GateSpec:
    """The router of an MoE layer: which experts a row goes to, with which weights.

    Scores are computed in float32. The `top_k` experts with the highest score (plus correction, if `corrected`) are chosen
    within the `top_groups` best of `num_groups` groups (a group's score is the sum of its two best, DeepSeek-V3; no expert of
    another group is ever chosen); their weights are the uncorrected scores, divided by their sum if `renormalize`, times `scale`.
    """

    num_experts: int
    top_k: int
    scoring: Scoring
    renormalize: bool
    corrected: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A gated feed-forward block of `width` columns."""

    width: int


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Routed experts of `width` columns each; a shared expert of `shared_width` columns if that is not 0."""

    gate: GateSpec
    width: int
    shared_width: int = 0
    shared_gated: bool = False  # its weight is sigmoid(SHARED_ROUTER . x) instead of 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding, layers of attention and feed-forward with a norm before each, final norm, output head."""

    family: str
    """Name of the family's module."""
    hidden: int
    vocabulary: int
    context: int
    """Most tokens of a sequence, prompt and completion together."""
    norm_eps: float
    attention: AttentionSpec
    feed_forward: tuple[DenseSpec | MoeSpec, ...]
    """One for each layer."""
    tied: bool
    """Whether the output head is the embedding."""
    names: Mapping[Role, str]
    """Checkpoint names by role, with {layer} and {expert} as placeholders; only roles that the model has."""
    fused_names: Mapping[Role, str]
    """What takes the place of `names` where a checkpoint keeps all experts of a layer in one tensor; empty without experts."""
    stop_ids: tuple[int, ...]
    """End-of-sequence tokens of config.json (generation_config.json may name others)."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.feed_forward)

    def name(self, role: Role, layer: int | None = None) -> str:
        """Checkpoint name of a tensor; {expert} is left in place."""
        return self.names[role].replace("{layer}", str(layer))

    def fused(self) -> ModelSpec:
        """Give the same model with the names of the fused layout."""
        return replace(self, names={**self.names, **self.fused_names})
