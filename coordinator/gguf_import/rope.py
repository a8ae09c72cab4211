"""How a GGUF says that rotary frequencies are scaled, in the words of a config.json."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from protos.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coordinator.gguf_import.header import GgufFile, Metadata

_FREQUENCIES = "rope_freqs.weight"
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""What all public Llama 3.1, 3.2 and 3.3 models have; the file holds only what came out of them."""


def rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, object] | None:
    """Make the `rope_scaling` of a config.json; None if frequencies are not scaled.

    Raises:
        ModelError: a way of scaling that is not supported, or that the file does not say enough about.

    """
    metadata = file.metadata
    if _FREQUENCIES in file.tensors:
        return _llama3(_divisors(file), theta, head_dim)
    factor = metadata.number("llama.rope.scaling.factor", metadata.number("llama.rope.scale_linear", 1.0))
    kind = metadata.text("llama.rope.scaling.type", "none" if factor == 1.0 else "linear")
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": factor}
        case "yarn":
            return _yarn(metadata, factor)
    raise ModelError(f"GGUF: rope scaling {kind!r} is not supported (none, linear, yarn and Llama 3's are)")


def _yarn(metadata: Metadata, factor: float) -> dict[str, object]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer("llama.rope.scaling.original_context_length"),
    }


def _divisors(file: GgufFile) -> NDArray[np.float32]:
    tensor = file.tensors[_FREQUENCIES]
    if tensor.kind.name != "F32" or len(tensor.shape) != 1:
        raise ModelError(f"GGUF: {_FREQUENCIES} must be a float32 vector, found {tensor.kind.name} {list(tensor.shape)}")
    return np.frombuffer(file.data[tensor.offset : tensor.offset + tensor.num_bytes].tobytes(), dtype="<f4")


def _llama3(divisors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, object] | None:
    """Find the factor of Llama 3's scaling: the divisors must be what the formula makes of it."""
    if np.all(divisors == 1):
        return None
    factor = round(float(divisors.max()), 4)
    wanted = [_divisor(theta ** (2 * index / head_dim) * 2 * math.pi, factor) for index in range(head_dim // 2)]
    if len(wanted) != len(divisors) or not np.allclose(divisors, wanted, rtol=1e-4):
        raise ModelError(
            f"GGUF: {_FREQUENCIES} is not Llama 3's scaling of {_ORIGINAL} positions, which is the only one supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _divisor(wavelength: float, factor: float) -> float:
    """By how much a frequency is divided (transformers, `_compute_llama3_parameters`)."""
    if wavelength < _ORIGINAL / _HIGH:
        return 1.0
    if wavelength > _ORIGINAL / _LOW:
        return factor
    smooth = (_ORIGINAL / wavelength - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
