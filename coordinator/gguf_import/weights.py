"""Tensors of a llama GGUF -> weights of a Hugging Face checkpoint: names, order of rows, values.

llama.cpp rotates neighbouring elements of a head, Hugging Face an element of the first half with its partner in the second; so
the converter to GGUF interleaved the rows of q and k, and here they are put back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from coordinator.gguf_import.config import Dimensions
    from coordinator.gguf_import.header import GgufFile, TensorInfo

_CHUNK = 2**22
"""Elements that are dequantized at once."""

_IGNORED = ("rope_freqs.weight", ".attn_rot_embd.weight", ".attention.rotary_emb.inv_freq")
"""Frequencies, which the config says already."""

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output", *_DENSE)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the checkpoint and where its values come from."""

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    rows: NDArray[np.int64]
    """Of the source, as a matrix of rows (last dimension), in the order in which they are wanted."""
    columns: NDArray[np.int64] | None = None
    """Order of the elements, if the source is a vector that is permuted (biases of q and k)."""

    @property
    def num_elements(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)


def weights(file: GgufFile, dimensions: Dimensions) -> list[Weight]:
    """List the checkpoint's weights in order.

    Raises:
        ModelError: a tensor is missing, has another shape than the metadata says, or is not known.

    """
    found = _Found(file)
    result = [found.take("token_embd.weight", "model.embed_tokens.weight", (dimensions.vocabulary, dimensions.hidden))]
    for layer in range(dimensions.layers):
        result += _layer(found, dimensions, layer)
    result.append(found.take("output_norm.weight", "model.norm.weight", (dimensions.hidden,)))
    if "output.weight" in file.tensors:
        result.append(found.take("output.weight", "lm_head.weight", (dimensions.vocabulary, dimensions.hidden)))
    if unknown := [name for name in found.left if not name.endswith(_IGNORED)]:
        raise ModelError(f"GGUF: tensor {unknown[0]} is not part of a llama model as known here: get the model's safetensors")
    return result


def read_values(file: GgufFile, weight: Weight, dtype: torch.dtype) -> Iterator[bytes]:
    """Give a weight's values, little-endian, a bounded number of rows at a time.

    Raises:
        ModelError: a quantization that cannot be read, or a value that is not finite or does not fit the dtype.

    """
    source = weight.source
    table = file.data[source.offset : source.offset + source.num_bytes].reshape(-1, source.row_bytes)
    step = max(1, _CHUNK // source.shape[-1])
    for start in range(0, len(weight.rows), step):
        values = _dequantize(table[weight.rows[start : start + step]], source)
        if weight.columns is not None:
            values = values[:, weight.columns]
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"GGUF: tensor {source.name} has a value that is not finite as {dtype}: choose another dtype or file"
            )
        yield tensor.view(torch.uint8).numpy().tobytes()


def _dequantize(rows: NDArray[np.uint8], source: TensorInfo) -> NDArray[np.float32]:
    if source.kind == GGMLQuantizationType.F64:
        return rows.view("<f8").astype(np.float32)
    try:
        values: NDArray[np.float32] = quants.dequantize(rows, source.kind)
    except NotImplementedError:
        raise ModelError(f"GGUF: tensor {source.name} is {source.kind.name}, which the package gguf cannot dequantize") from None
    return values


def _layer(found: _Found, dimensions: Dimensions, layer: int) -> Iterator[Weight]:
    names = _ATTENTION if dimensions.experts else _ATTENTION | _DENSE
    shapes = _shapes(dimensions)
    for source, target in names.items():
        shape = shapes[source]
        for part in ("weight", "bias"):
            name = f"blk.{layer}.{source}.{part}"
            if part == "bias" and (source not in _BIASED or name not in found.left):
                continue
            heads = {"attn_q": dimensions.heads, "attn_k": dimensions.kv_heads}.get(source)
            wanted = shape if part == "weight" else shape[:1]
            yield found.take(name, f"model.layers.{layer}.{target}.{part}", wanted, heads=heads)
    if dimensions.experts:
        yield from _experts(found, dimensions, layer)


def _experts(found: _Found, dimensions: Dimensions, layer: int) -> Iterator[Weight]:
    prefix = f"model.layers.{layer}.block_sparse_moe"
    yield found.take(f"blk.{layer}.ffn_gate_inp.weight", f"{prefix}.gate.weight", (dimensions.experts, dimensions.hidden))
    for source, target in _EXPERTS.items():
        shape = _shapes(dimensions)[source.removesuffix("_exps")]
        for expert in range(dimensions.experts):
            name = f"blk.{layer}.{source}.weight"
            yield found.take_expert(name, f"{prefix}.experts.{expert}.{target}.weight", shape, expert, dimensions.experts)


def _shapes(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    hidden, width = dimensions.hidden, dimensions.width
    q, kv = dimensions.heads * dimensions.head_dim, dimensions.kv_heads * dimensions.head_dim
    return {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (width, hidden),
        "ffn_up": (width, hidden),
        "ffn_down": (hidden, width),
    }


class _Found:
    """The file's tensors, and which of them nobody has asked for yet."""

    def __init__(self, file: GgufFile) -> None:
        self._tensors = file.tensors
        self.left = set(file.tensors)

    def take(self, source: str, name: str, shape: tuple[int, ...], heads: int | None = None) -> Weight:
        """Make a weight of a whole tensor; with `heads`, interleaved rows are put back in order."""
        tensor = self._find(source, shape)
        order = np.arange(shape[0]) if heads is None else _order(shape[0], heads)
        if len(shape) == 1:
            return Weight(name, shape, tensor, np.zeros(1, dtype=np.int64), None if heads is None else order)
        return Weight(name, shape, tensor, order)

    def take_expert(self, source: str, name: str, shape: tuple[int, ...], expert: int, experts: int) -> Weight:
        """Make a weight of one expert's part of a tensor that stacks all of them."""
        tensor = self._find(source, (experts, *shape))
        return Weight(name, shape, tensor, np.arange(expert * shape[0], (expert + 1) * shape[0]))

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"GGUF: tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelError(f"GGUF: tensor {name} must have shape {list(shape)}, found {list(tensor.shape)}")
        self.left.discard(name)
        return tensor


def _order(rows: int, heads: int) -> NDArray[np.int64]:
    """Rows of the GGUF in the order of Hugging Face: of each head first the even ones, then the odd ones."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
