"""What a config may ask for that no family here computes: refused by key and value where it is in force, never passed over."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator.models.rope import context_tokens
from coordinator.models.spec import MoeSpec, Scoring
from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.models.config import Config
    from coordinator.models.spec import DenseSpec

NEUTRAL: Mapping[str, tuple[tuple[object, ...], str]] = MappingProxyType(
    {
        "hidden_act": (("silu", "swish"), "supported are silu, swish"),
        "attn_logit_softcapping": ((), "attention scores are taken as they are"),
        "final_logit_softcapping": ((), "logits are taken as they are"),
        "logits_scaling": ((1,), "logits are taken as they are"),
        "logit_scale": ((1,), "logits are taken as they are"),
        "residual_multiplier": ((1,), "what a layer computes is added as it is"),
        "embedding_multiplier": ((1,), "embeddings are taken as they are"),
        "attention_multiplier": ((), "attention scores are divided by the square root of head_dim"),
    }
)
"""Key -> values with which it changes nothing (absent and null always do), and what is done instead of the others."""

_SCORING_NAMES = {Scoring.SOFTMAX: "softmax", Scoring.SIGMOID: "sigmoid"}
_MAX_WINDOW = 2**31 - 1


def refuse_unsupported(config: Config, blocks: Iterable[DenseSpec | MoeSpec], *, window: bool | None) -> None:
    """Refuse what would be computed otherwise than the config says.

    Args:
        config: the model's.
        blocks: the layers' feed-forward blocks.
        window: whether the family, by its own switches, applies the `sliding_window` that the config names; None: unless
            `use_sliding_window` is false.

    Raises:
        ModelError: names the key and its value.

    """
    for key, (neutral, instead) in NEUTRAL.items():
        # A bool equals 0 or 1 and is neither.
        if config.has(key) and (isinstance(config.values[key], bool) or config.values[key] not in neutral):
            raise config.refuse(key, instead)
    _refuse_quantized(config)
    _refuse_window(config, in_use=config.boolean("use_sliding_window", default=True) if window is None else window)
    for key in ("rope_scaling", "rope_parameters"):
        if (section := config.section(key)) and section.has("mrope_section"):
            raise section.refuse("mrope_section", "all elements are rotated by one position")
    for scoring in {block.gate.scoring for block in blocks if isinstance(block, MoeSpec)}:
        own = _SCORING_NAMES[scoring]
        if config.text("scoring_func", default=own) != own:
            raise config.refuse("scoring_func", f"experts of this family are scored by {own}")


def _refuse_quantized(config: Config) -> None:
    instead = "take the unquantized checkpoint, weights are quantized while they load (--quantize)"
    for key in ("quantization_config", "compression_config"):
        if section := config.section(key):
            method = section.text("quant_method", default="unknown")
            raise ModelError(f"{section.source}: quant_method {method!r} is not supported: {instead}")
    for key in ("dtype", "torch_dtype"):
        if config.text(key, default="").removeprefix("torch.").startswith("float8"):
            raise config.refuse(key, instead)


def _refuse_window(config: Config, *, in_use: bool) -> None:
    if any(kind != "full_attention" for kind in config.texts("layer_types")):
        raise config.refuse("layer_types", "only layers of full_attention are")
    window = config.integer("sliding_window", default=0, minimum=0, maximum=_MAX_WINDOW)
    if in_use and 0 < window < context_tokens(config) and not config.has("layer_types"):
        raise config.refuse("sliding_window", f"attention covers the whole context of {context_tokens(config)} tokens")
