"""Rotary frequencies from a config, bit-equal to those of transformers' `modeling_rope_utils`.

Hence computed as there, by torch in float32 and in the same order. The only file of `models/` that needs torch.

Sources: linear (kaiokendev), dynamic NTK (bloc97, emozilla), YaRN (arXiv:2309.00071), llama3 (Llama 3.1's reference code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.errors import ModelError
from protos.plan_pb2 import DynamicNtk, RopeSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.models.config import Config

DEFAULT_THETA = 10_000.0
MAX_CONTEXT = 2**31 - 1
_MAX_FACTOR = 1e6
_LEAST_DYNAMIC_DIMS = 4  # the exponent dims / (dims - 2) must exist


@dataclass(frozen=True, slots=True)
class _Rope:
    """What a config says about rope, whichever way it spells it."""

    kind: str
    values: Config
    theta: float
    dims: int
    positions: int
    """max_position_embeddings."""
    original: float
    """Positions of the training; max_position_embeddings where the config does not say."""

    @property
    def factor(self) -> float:
        return self.values.number("factor", above=math.nextafter(1, 0), maximum=_MAX_FACTOR)


def rope_spec(config: Config, head_dim: int, *, theta: float = DEFAULT_THETA, partial: float = 1.0) -> RopeSpec:
    """Compute what a worker needs to rotate queries and keys.

    Args:
        config: the model's.
        head_dim: elements of a head.
        theta: the family's base where the config names none.
        partial: the family's share of a head that is rotated where the config names none.

    Raises:
        ModelError: an unknown rope type, or parameters that are missing or out of range.

    """
    rope = _read(config, head_dim, theta, partial)
    inverse_frequencies, attention_factor = _VARIANTS[rope.kind](rope)
    if not bool(torch.isfinite(inverse_frequencies).all()):
        raise ModelError(
            f"{rope.values.source}: rope type {rope.kind!r} with these numbers gives frequencies that are not finite"
        )
    spec = RopeSpec(rotary_dims=rope.dims, inverse_frequencies=inverse_frequencies.tolist(), attention_factor=attention_factor)
    # With factor 1 nothing changes up to the end of the context.
    if rope.kind == "dynamic" and rope.factor > 1:
        spec.dynamic.CopyFrom(DynamicNtk(base=rope.theta, factor=rope.factor, original_positions=rope.positions))
    return spec


def context_tokens(config: Config) -> int:
    """Most tokens of a sequence.

    `max_position_embeddings` as the config states it, stretched where the rope type's factor is meant to stretch it (as vLLM
    does, and as models' cards tell users to expect): `linear` and `dynamic` by the factor; `yarn` to factor x the original
    positions, if that is more (Qwen's cards: 32768 x 4, beside a stated 40960). `llama3` configs state the stretched length.
    """
    positions = _positions(config)
    section, kind = _section(config), _kind(config)
    if section is None or kind not in ("linear", "dynamic", "yarn") or not section.has("factor"):
        return positions
    factor = section.number("factor", above=math.nextafter(1, 0), maximum=_MAX_FACTOR)
    base = _original(config, section) if kind == "yarn" else positions
    return min(MAX_CONTEXT, max(positions, int(base * factor)))


def _read(config: Config, head_dim: int, theta: float, partial: float) -> _Rope:
    section, kind = _section(config) or config, _kind(config)
    if kind not in _VARIANTS:
        raise ModelError(f"{section.source}: rope type {kind!r} is not supported, supported are {', '.join(_VARIANTS)}")
    holder = _either(section, config, "partial_rotary_factor")
    share = holder.number("partial_rotary_factor", default=partial, maximum=1.0)
    if share != 1 and partial == 1:
        raise holder.refuse("partial_rotary_factor", "this family rotates whole heads")
    dims = int(head_dim * share)
    if dims % 2 or dims == 0 or (kind == "dynamic" and dims < _LEAST_DYNAMIC_DIMS):
        raise ModelError(
            f"{config.source}: {dims} of a head's {head_dim} elements would be rotated, that must be an even number > 0"
        )
    return _Rope(
        kind=kind,
        values=section,
        theta=_either(section, config, "rope_theta").number("rope_theta", default=theta, above=1),
        dims=dims,
        positions=_positions(config),
        original=_original(config, section),
    )


def _section(config: Config) -> Config | None:
    """Give the object with the rope parameters in either spelling; None where there is none."""
    section = config.section("rope_scaling") or config.section("rope_parameters")
    if section and any(isinstance(value, dict) for value in section.values.values()):
        raise ModelError(f"{section.source}: rope parameters for each type of layer are not supported, wanted one set for all")
    return section


def _kind(config: Config) -> str:
    section = _section(config)
    return section.text("rope_type", "type", default="default") if section else "default"


def _either(first: Config, second: Config, key: str) -> Config:
    return first if first.has(key) else second


def _positions(config: Config) -> int:
    return config.integer("max_position_embeddings", maximum=MAX_CONTEXT)


def _original(config: Config, section: Config) -> float:
    # transformers gives a top-level value priority over one among the rope parameters.
    key = "original_max_position_embeddings"
    return _either(config, section, key).number(key, default=_positions(config), maximum=MAX_CONTEXT)


def _default(rope: _Rope) -> tuple[torch.Tensor, float]:
    return 1.0 / _powers(rope.theta, rope.dims), 1.0


def _linear(rope: _Rope) -> tuple[torch.Tensor, float]:
    return 1.0 / _powers(rope.theta, rope.dims) / rope.factor, 1.0


def _dynamic(rope: _Rope) -> tuple[torch.Tensor, float]:
    # For a text within the original positions; the worker computes longer ones (protos/plan.proto, DynamicNtk).
    stretch = rope.factor * rope.positions / rope.positions - (rope.factor - 1)
    base = rope.theta * stretch ** (rope.dims / (rope.dims - 2))
    return 1.0 / _powers(base, rope.dims), 1.0


def _llama3(rope: _Rope) -> tuple[torch.Tensor, float]:
    low = rope.values.number("low_freq_factor")
    high = rope.values.number("high_freq_factor", above=low)
    plain = 1.0 / _powers(rope.theta, rope.dims)
    wavelengths = 2 * math.pi / plain
    scaled = torch.where(wavelengths > rope.original / low, plain / rope.factor, plain)
    smooth = (rope.original / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelengths < rope.original / high) * ~(wavelengths > rope.original / low)
    return torch.where(between, smoothed, scaled), 1.0


def _yarn(rope: _Rope) -> tuple[torch.Tensor, float]:
    factor = rope.factor if rope.values.has("factor") else rope.positions / rope.original
    fast = rope.values.number("beta_fast", default=32)
    slow = rope.values.number("beta_slow", default=1)
    low, high = (_dims_of_rotations(rope, count) for count in (fast, slow))
    if rope.values.boolean("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001  # as in the reference: no division by 0
    ramp = torch.clamp((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    powers = _powers(rope.theta, rope.dims)
    extrapolated = 1 - ramp
    frequencies = 1.0 / (factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated
    return frequencies, _yarn_attention_factor(rope.values, factor)


def _dims_of_rotations(rope: _Rope, rotations: float) -> float:
    """Dimension whose wave turns `rotations` times within the original positions."""
    return (rope.dims * math.log(rope.original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))


def _yarn_attention_factor(values: Config, factor: float) -> float:
    if values.has("attention_factor"):
        return values.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    # 0 means absent, as in the reference.
    weights = [values.number(key, default=0, above=-1) for key in ("mscale", "mscale_all_dim")]
    return mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1)


def _powers(base: float, dims: int) -> torch.Tensor:
    exponents = torch.arange(0, dims, 2, dtype=torch.int64).to(torch.float) / dims
    return torch.pow(base, exponents)


_VARIANTS: dict[str, Callable[[_Rope], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
