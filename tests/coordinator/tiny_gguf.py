"""A small llama GGUF, written by the package `gguf`, for the tests of the import."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from coordinator.text.decoding import _BYTES

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 2, 64, 4, 2, 16, 96, 300
EXPERTS = 4


@dataclasses.dataclass
class Model:
    """What to write into a small GGUF; tests change a field and write."""

    architecture: str = "llama"
    tied: bool = True
    experts: int = 0
    biases: bool = False
    metadata: dict[str, Callable[[gguf.GGUFWriter], None]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, tuple[NDArray[np.float32], Kind] | None] = dataclasses.field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for set_value in (metadata() | byte_level_vocabulary() | self.metadata).values():
            set_value(writer)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        for name, tensor in (self.weights() | self.tensors).items():
            if tensor is not None:
                values, kind = tensor
                data = values if kind in {Kind.F32, Kind.F64} else gguf.quantize(values, kind)
                writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float32 else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def weights(self) -> dict[str, tuple[NDArray[np.float32], Kind] | None]:
        """Random weights, in another quantization each."""
        rng = np.random.default_rng(0)

        def matrix(*shape: int, kind: Kind = Kind.F32) -> tuple[NDArray[np.float32], Kind]:
            return (rng.standard_normal(shape, dtype=np.float32) * 0.2, kind)

        result: dict[str, tuple[NDArray[np.float32], Kind] | None] = {
            "token_embd.weight": matrix(VOCABULARY, HIDDEN, kind=Kind.Q8_0),
            "output_norm.weight": matrix(HIDDEN),
        }
        if not self.tied:
            result["output.weight"] = matrix(VOCABULARY, HIDDEN, kind=Kind.F16)
        for layer in range(LAYERS):
            sizes = {
                "attn_q": (HEADS * HEAD_DIM, HIDDEN, Kind.Q4_1),
                "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN, Kind.Q8_0),
                "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN, Kind.F16),
                "attn_output": (HIDDEN, HEADS * HEAD_DIM, Kind.BF16),
            }
            feed_forward = {
                "ffn_gate": (WIDTH, HIDDEN, Kind.Q4_0),
                "ffn_up": (WIDTH, HIDDEN, Kind.Q5_0),
                "ffn_down": (HIDDEN, WIDTH, Kind.Q5_1),
            }
            for name, (rows, columns, kind) in sizes.items():
                result[f"blk.{layer}.{name}.weight"] = matrix(rows, columns, kind=kind)
                if self.biases:
                    result[f"blk.{layer}.{name}.bias"] = matrix(rows)
            for name, (rows, columns, kind) in feed_forward.items():
                stacked = f"blk.{layer}.{name}_exps.weight"
                if self.experts:
                    result[stacked] = matrix(self.experts, rows, columns, kind=kind)
                else:
                    result[f"blk.{layer}.{name}.weight"] = matrix(rows, columns, kind=kind)
            if self.experts:
                result[f"blk.{layer}.ffn_gate_inp.weight"] = matrix(self.experts, HIDDEN)
            result |= {f"blk.{layer}.{norm}.weight": matrix(HIDDEN) for norm in ("attn_norm", "ffn_norm")}
        return result


def metadata() -> dict[str, Callable[[gguf.GGUFWriter], None]]:
    return {
        "layers": lambda w: w.add_block_count(LAYERS),
        "context": lambda w: w.add_context_length(256),
        "hidden": lambda w: w.add_embedding_length(HIDDEN),
        "width": lambda w: w.add_feed_forward_length(WIDTH),
        "heads": lambda w: w.add_head_count(HEADS),
        "kv_heads": lambda w: w.add_head_count_kv(KV_HEADS),
        "theta": lambda w: w.add_rope_freq_base(50000.0),
        "eps": lambda w: w.add_layer_norm_rms_eps(1e-5),
    }


def byte_level_vocabulary(pre: str = "gpt-2", extra: Sequence[str] = ()) -> dict[str, Callable[[gguf.GGUFWriter], None]]:
    bytes_ = sorted(_BYTES)
    merges = ["t h", "th e", "Ġ the", "Ġ Ġ", "1 2"]
    tokens = ["<|end|>", "<|start|>", *bytes_, *(merge.replace(" ", "") for merge in merges), "<think>"]
    tokens += extra
    tokens += [f"[PAD{number}]" for number in range(VOCABULARY - len(tokens))]
    types = [3, 3, *[1] * (len(bytes_) + len(merges)), 4, *[1] * len(extra)]
    types += [5] * (VOCABULARY - len(types))
    return {
        "model": lambda w: w.add_tokenizer_model("gpt2"),
        "pre": lambda w: w.add_tokenizer_pre(pre),
        "tokens": lambda w: w.add_token_list(tokens),
        "types": lambda w: w.add_token_types(types),
        "merges": lambda w: w.add_token_merges(merges),
        "bos": lambda w: w.add_bos_token_id(1),
        "eos": lambda w: w.add_eos_token_id(0),
        "template": lambda w: w.add_chat_template("{% for m in messages %}{{ '<|start|>' + m.content + eos_token }}{% endfor %}"),
    }


def sentence_piece_vocabulary() -> dict[str, Callable[[gguf.GGUFWriter], None]]:
    """A vocabulary as Llama 2's: bytes, characters, pieces with scores."""
    pieces = ["▁t", "he", "▁the", "the", "▁a", "ab", "▁▁", "ba", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁", *"theabé1"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-float(number) for number in range(len(tokens) - 259)]
    unused = VOCABULARY - len(tokens)
    tokens += [f"<unused{number}>" for number in range(unused)]
    return {
        "model": lambda w: w.add_tokenizer_model("llama"),
        "pre": lambda w: w.add_tokenizer_pre("default"),
        "tokens": lambda w: w.add_token_list(tokens),
        "types": lambda w: w.add_token_types([*types, *[3] * unused]),
        "scores": lambda w: w.add_token_scores([*scores, *[0.0] * unused]),
        "merges": lambda _: None,
        "bos": lambda w: w.add_bos_token_id(1),
        "eos": lambda w: w.add_eos_token_id(2),
        "unknown": lambda w: w.add_unk_token_id(0),
        "template": lambda _: None,
    }
