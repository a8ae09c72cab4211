"""The tensors that a spec wants, with their shapes, and which of a family's two expert layouts a checkpoint has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.models.spec import DenseSpec, ModelSpec, MoeSpec, Role
from protos.errors import ModelError
from protos.plan_pb2 import QK_NORM_FULL

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from coordinator.models.checkpoint import Checkpoint

WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""Dtypes of safetensors that a model's tensors may have."""

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor of the model, or one for each of `num_experts` experts."""

    role: Role
    name: str
    """With {expert} where `num_experts` is not 0."""
    shape: tuple[int, ...]
    num_experts: int = 0

    def names(self) -> Iterator[str]:
        """Names in the checkpoint."""
        if not self.num_experts:
            yield self.name
        for expert in range(self.num_experts):
            yield self.name.replace("{expert}", str(expert))


def match_layout(spec: ModelSpec, tensors: Container[str]) -> ModelSpec:
    """Give the spec with the names of the layout that is there: experts one by one, or fused."""
    layer = next((number for number, block in enumerate(spec.feed_forward) if isinstance(block, MoeSpec)), None)
    if layer is None or Role.FUSED_GATE_UP in spec.names:
        return spec
    fused = spec.fused()
    single = spec.name(Role.EXPERT_GATE, layer).replace("{expert}", "0")
    return fused if single not in tensors and fused.name(Role.FUSED_GATE_UP, layer) in tensors else spec


def has_own_head(spec: ModelSpec, tensors: Container[str] | None) -> bool:
    """Whether the output head is a tensor of its own, and not the embedding.

    A checkpoint that says "tied" and holds a head all the same has its head used, as transformers 5 does: it is the embedding's
    copy, or the config is wrong.
    """
    return not spec.tied or (tensors is not None and spec.name(Role.HEAD) in tensors)


def wanted_tensors(spec: ModelSpec, *, own_head: bool) -> Iterator[WantedTensor]:
    """List every tensor of the model, in the order of the forward pass."""
    yield WantedTensor(Role.EMBEDDING, spec.name(Role.EMBEDDING), (spec.vocabulary, spec.hidden))
    for layer, block in enumerate(spec.feed_forward):
        for role, shape in {**_attention_shapes(spec), **_feed_forward_shapes(spec, block)}.items():
            if role in spec.names:
                num_experts = block.gate.num_experts if isinstance(block, MoeSpec) and role in _EXPERT_ROLES else 0
                yield WantedTensor(role, spec.name(role, layer), shape, num_experts)
    yield WantedTensor(Role.FINAL_NORM, spec.name(Role.FINAL_NORM), (spec.hidden,))
    if own_head:
        yield WantedTensor(Role.HEAD, spec.name(Role.HEAD), (spec.vocabulary, spec.hidden))


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has every tensor, in the right shape and in a dtype that can be read.

    Raises:
        ModelError: naming the first tensor that is not as it must be.

    """
    missing: list[str] = []
    for wanted in wanted_tensors(spec, own_head=has_own_head(spec, checkpoint.tensors)):
        for name in wanted.names():
            entry = checkpoint.tensors.get(name)
            if entry is None:
                missing.append(name)
            elif entry.shape != wanted.shape:
                raise ModelError(
                    f"{checkpoint.directory / entry.file}: tensor {name!r} must have the shape {list(wanted.shape)}, "
                    f"as config.json says, found {list(entry.shape)}"
                )
            elif entry.dtype not in WEIGHT_DTYPES:
                raise ModelError(
                    f"{checkpoint.directory / entry.file}: tensor {name!r} has dtype {entry.dtype}, "
                    f"supported are {', '.join(WEIGHT_DTYPES)}"
                )
    if missing:
        rest = f", nor {len(missing) - 1} others that it needs" if len(missing) > 1 else ""
        raise ModelError(f"{checkpoint.directory} has no tensor {missing[0]!r}{rest}: it is not a whole {spec.family} model")


def num_parameters(spec: ModelSpec, *, own_head: bool) -> int:
    """Count the model's parameters (a tied head once; no multi-token prediction layers)."""
    return sum(math.prod(wanted.shape) * max(1, wanted.num_experts) for wanted in wanted_tensors(spec, own_head=own_head))


def _attention_shapes(spec: ModelSpec) -> dict[Role, tuple[int, ...]]:
    attention = spec.attention
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    full = attention.qk_norm == QK_NORM_FULL
    return {
        Role.ATTENTION_NORM: (spec.hidden,),
        Role.Q: (queries, spec.hidden),
        Role.K: (keys, spec.hidden),
        Role.V: (keys, spec.hidden),
        Role.O: (spec.hidden, queries),
        Role.Q_BIAS: (queries,),
        Role.K_BIAS: (keys,),
        Role.V_BIAS: (keys,),
        Role.O_BIAS: (spec.hidden,),
        Role.Q_NORM: (queries if full else attention.head_dim,),
        Role.K_NORM: (keys if full else attention.head_dim,),
        Role.FEED_FORWARD_NORM: (spec.hidden,),
    }


def _feed_forward_shapes(spec: ModelSpec, block: DenseSpec | MoeSpec) -> dict[Role, tuple[int, ...]]:
    if isinstance(block, DenseSpec):
        into, out = (block.width, spec.hidden), (spec.hidden, block.width)
        biases = {Role.GATE_BIAS: (block.width,), Role.UP_BIAS: (block.width,), Role.DOWN_BIAS: (spec.hidden,)}
        return {Role.GATE: into, Role.UP: into, Role.DOWN: out, **biases}
    experts = block.gate.num_experts
    shapes: dict[Role, tuple[int, ...]] = {
        Role.ROUTER: (experts, spec.hidden),
        Role.ROUTER_CORRECTION: (experts,),
    }
    if Role.FUSED_GATE_UP in spec.names:
        shapes |= {
            Role.FUSED_GATE_UP: (experts, 2 * block.width, spec.hidden),
            Role.FUSED_DOWN: (experts, spec.hidden, block.width),
        }
    else:
        into, out = (block.width, spec.hidden), (spec.hidden, block.width)
        shapes |= {Role.EXPERT_GATE: into, Role.EXPERT_UP: into, Role.EXPERT_DOWN: out}
    if block.shared_width:
        into, out = (block.shared_width, spec.hidden), (spec.hidden, block.shared_width)
        shapes |= {Role.SHARED_GATE: into, Role.SHARED_UP: into, Role.SHARED_DOWN: out, Role.SHARED_ROUTER: (1, spec.hidden)}
    return shapes
