"""The vocabulary of families: attention and feed-forward, put together from a config.

A family file only states what is particular to it; what a config asks for beyond that is refused (`models.unsupported`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.models.config import eos_token_ids
from coordinator.models.names import ATTENTION_BIASES, EXPERTS, FUSED, MLP_BIASES
from coordinator.models.rope import DEFAULT_THETA, context_tokens, rope_spec
from coordinator.models.spec import DenseSpec, ModelSpec, MoeSpec, Role
from coordinator.models.unsupported import refuse_unsupported
from protos.errors import ModelError
from protos.plan_pb2 import QK_NORM_NONE, AttentionSpec, QkNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from coordinator.models.config import Config

    FeedForward = DenseSpec | MoeSpec

_NORMS = frozenset({Role.Q_NORM, Role.K_NORM})

_MAX_LAYERS = 4096
_MAX_PRODUCT = 2**31 - 1


def decoder(
    config: Config,
    family: str,
    names: Mapping[Role, str],
    *,
    attention: AttentionSpec,
    feed_forward: Callable[[int], FeedForward],
    biases: Collection[Role] = (),
    norm_eps: float = 1e-6,
    window: bool | None = None,
) -> ModelSpec:
    """Put a model together.

    Args:
        config: the model's.
        family: name of the family's module.
        names: of every role that a model of the family may have.
        attention: of all layers.
        feed_forward: layer -> its feed-forward block.
        biases: the bias roles that this model has.
        norm_eps: the family's epsilon where the config names none.
        window: whether `sliding_window` is applied, by the family's own switches (`refuse_unsupported`).

    Raises:
        ModelError: a value is missing, out of range or not supported.

    """
    blocks = tuple(feed_forward(layer) for layer in range(num_layers(config)))
    refuse_unsupported(config, blocks, window=window)
    absent = _absent_roles(attention, blocks, biases)
    return ModelSpec(
        family=family,
        hidden=config.integer("hidden_size"),
        vocabulary=config.integer("vocab_size"),
        context=context_tokens(config),
        norm_eps=config.number("rms_norm_eps", default=norm_eps, maximum=1),
        attention=attention,
        feed_forward=blocks,
        tied=config.boolean("tie_word_embeddings", default=False),
        names={role: name for role, name in names.items() if role not in absent},
        fused_names=FUSED if any(isinstance(block, MoeSpec) for block in blocks) else {},
        stop_ids=eos_token_ids(config),
    )


def gqa(
    config: Config,
    *,
    qk_norm: QkNorm = QK_NORM_NONE,
    head_dim: int | None = None,
    clip_qkv: float = 0.0,
    theta: float = DEFAULT_THETA,
    partial_rotary: float = 1.0,
) -> AttentionSpec:
    """Grouped-query attention.

    Args:
        config: the model's.
        qk_norm: where queries and keys are normed.
        head_dim: the family's where the config names none; None means hidden size / heads.
        clip_qkv: bound of the projections, 0 for none.
        theta: the family's rope base where the config names none.
        partial_rotary: the family's rotated share of a head where the config names none.

    """
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ModelError(
            f"{config.source}: num_attention_heads must be a multiple of num_key_value_heads, found {heads} and {kv_heads}"
        )
    elements = config.integer("head_dim", default=head_dim or _head_dim(config, heads))
    product(config, "num_attention_heads x head_dim", heads, elements)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=elements,
        scale=elements**-0.5,
        qk_norm=qk_norm,
        qk_norm_eps=0 if qk_norm == QK_NORM_NONE else config.number("rms_norm_eps", default=1e-6, maximum=1),
        clip_qkv=clip_qkv,
        rope=rope_spec(config, elements, theta=theta, partial=partial_rotary),
    )


def dense(config: Config) -> DenseSpec:
    """Give the dense block of `intermediate_size` columns."""
    return DenseSpec(config.integer("intermediate_size"))


def top_k(config: Config, num_experts: int) -> int:
    """Read how many experts see a row."""
    return config.integer("num_experts_per_tok", maximum=num_experts)


def qwen_moe_layers(config: Config, experts: Callable[[], MoeSpec]) -> Callable[[int], FeedForward]:
    """Tell MoE layers from dense ones by Qwen's rule: every `decoder_sparse_step`-th but for `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense_layers = frozenset(config.integers("mlp_only_layers"))
    if config.integer("num_experts", "num_local_experts", minimum=0) == 0:
        dense_layers = frozenset(range(num_layers(config)))
    return lambda layer: dense(config) if layer in dense_layers or (layer + 1) % step else experts()


def num_layers(config: Config) -> int:
    """Read the number of decoder layers."""
    return config.integer("num_hidden_layers", maximum=_MAX_LAYERS)


def product(config: Config, what: str, left: int, right: int) -> int:
    """Multiply two sizes of a config.

    Raises:
        ModelError: the product is beyond what a tensor's dimension may be.

    """
    if (found := left * right) > _MAX_PRODUCT:
        raise ModelError(f"{config.source}: {what} = {found} is too large, at most {_MAX_PRODUCT} is possible")
    return found


def _head_dim(config: Config, heads: int) -> int:
    hidden = config.integer("hidden_size")
    if hidden % heads and not config.has("head_dim"):
        raise ModelError(
            f"{config.source}: without head_dim, hidden_size must be a multiple of num_attention_heads, "
            f"found {hidden} and {heads}"
        )
    return max(1, hidden // heads)


def _absent_roles(attention: AttentionSpec, blocks: tuple[FeedForward, ...], biases: Collection[Role]) -> frozenset[Role]:
    absent = (ATTENTION_BIASES | MLP_BIASES).difference(biases)
    if attention.qk_norm == QK_NORM_NONE:
        absent |= _NORMS
    moe = [block for block in blocks if isinstance(block, MoeSpec)]
    if not moe:
        absent |= EXPERTS.keys()
    if not any(block.gate.corrected for block in moe):
        absent |= {Role.ROUTER_CORRECTION}
    if not any(block.shared_width for block in moe):
        absent |= {Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN, Role.SHARED_ROUTER}
    if len(moe) == len(blocks):
        absent |= {Role.GATE, Role.UP, Role.DOWN} | MLP_BIASES
    return absent
