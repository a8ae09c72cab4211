"""A GGUF file of random weights with the geometry of a Qwen3-MoE config.json: what llama.cpp gets to run beside us.

    python -m bench.random_gguf bench/models/a3b-4l a3b-4l.gguf

Types are those that llama.cpp's own quantizer gives for Q4_0: matrices in Q4_0, the output head in Q6_K, norms and routers in
float32. Blocks are drawn, not quantized: random bits under a scale that gives a standard deviation of 0.02. There is no tokenizer
in the file, so ids go in and come out. Tensors are written one after the other; the largest takes memory once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

STD = 0.02
SEED = 0

# Of the integers in a block, all equally likely: 4 bits in Q4_0, 6 bits in Q6_K.
Q4_STD = 4.61
Q6_STD = 18.47

Q4_SCALE_BYTES = 2
Q6_BITS_BYTES, Q6_SCALES = 192, 16
Q6_SUBSCALE = 16
"""Q6_K has 16 small integers as scales under the block's own: all of them are this, so that the block's is no denormal."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the file says of one tensor before its data."""

    name: str
    shape: tuple[int, ...]
    """Of values, slowest dimension first."""
    type: Type

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Likewise, of bytes."""
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // values * size)


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors of a Qwen3-MoE model, as llama.cpp names them."""
    hidden, vocabulary, columns = config["hidden_size"], config["vocab_size"], config["moe_intermediate_size"]
    experts, dim = config["num_experts"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield Tensor("token_embd.weight", (vocabulary, hidden), Type.Q4_0)
    for layer in range(config["num_hidden_layers"]):
        for name, shape, kind in (
            ("attn_norm", (hidden,), Type.F32),
            ("attn_q", (queries, hidden), Type.Q4_0),
            ("attn_k", (keys, hidden), Type.Q4_0),
            ("attn_v", (keys, hidden), Type.Q4_0),
            ("attn_q_norm", (dim,), Type.F32),
            ("attn_k_norm", (dim,), Type.F32),
            ("attn_output", (hidden, queries), Type.Q4_0),
            ("ffn_norm", (hidden,), Type.F32),
            ("ffn_gate_inp", (experts, hidden), Type.F32),
            ("ffn_gate_exps", (experts, columns, hidden), Type.Q4_0),
            ("ffn_up_exps", (experts, columns, hidden), Type.Q4_0),
            ("ffn_down_exps", (experts, hidden, columns), Type.Q4_0),
        ):
            yield Tensor(f"blk.{layer}.{name}.weight", shape, kind)
    yield Tensor("output_norm.weight", (hidden,), Type.F32)
    yield Tensor("output.weight", (vocabulary, hidden), Type.Q6_K)


def draw(tensor: Tensor, generator: np.random.Generator) -> NDArray[Any]:
    """Draw a tensor: bytes of blocks, or float32; norms are ones."""
    if tensor.type is Type.F32:
        ones = len(tensor.shape) == 1
        values = np.ones(tensor.shape) if ones else generator.normal(0, STD, tensor.shape)
        return values.astype(np.float32)
    data = generator.integers(0, 256, tensor.byte_shape, np.uint8)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.type][1])
    if tensor.type is Type.Q4_0:
        blocks[:, :Q4_SCALE_BYTES] = _scales(len(blocks), STD / Q4_STD, generator)
    else:
        blocks[:, Q6_BITS_BYTES : Q6_BITS_BYTES + Q6_SCALES] = Q6_SUBSCALE
        blocks[:, Q6_BITS_BYTES + Q6_SCALES :] = _scales(len(blocks), STD / Q6_STD / Q6_SUBSCALE, generator)
    return data


def _scales(count: int, scale: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of float16 scales [count, 2]. The integers' mean is -1/2: scales of both signs make the weights' mean zero."""
    signs = generator.choice((-1, 1), (count, 1))
    return (signs * scale).astype("<f2").view(np.uint8)


def write_gguf(config: dict[str, Any], path: Path) -> None:
    """Write the file, the same one for the same config.

    Args:
        config: of a Qwen3-MoE model; rows of all matrices are multiples of 32 values, those of the head of 256.
        path: where to.

    """
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _add_metadata(writer, config)
    for tensor in tensors(config):
        dtype = np.dtype(np.float32 if tensor.type is Type.F32 else np.uint8)
        shape = tensor.shape if tensor.type is Type.F32 else tensor.byte_shape
        writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(tensor.byte_shape)), tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(SEED)
    for tensor in tensors(config):
        writer.write_tensor_data(draw(tensor, generator))
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def main(model: Path, output: Path) -> None:
    """Write random weights for the config.json in MODEL to OUTPUT."""
    write_gguf(json.loads((model / "config.json").read_text()), output)


if __name__ == "__main__":
    main()
