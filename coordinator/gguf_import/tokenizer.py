"""GGUF metadata -> tokenizer.json and tokenizer_config.json.

A GGUF holds the vocabulary and the name of a pre-tokenizer; what that name means is written in llama.cpp (`llm_tokenizer_bpe`,
src/llama-vocab.cpp). Those are told here that llama-family models have, in the words of the model's own tokenizer.json.
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.gguf_import.header import Metadata

_SPACE = "▁"


class TokenType(enum.IntEnum):
    """What `tokenizer.ggml.token_type` says of each token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}
_DIGITS = ("smollm", "starcoder", "refact")
_GPT2 = ("gpt-2", "default")
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
"""Pre-tokenizers whose models take a word as one token if the vocabulary has it, whatever the merges would make of it."""

_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3")


def tokenizer_files(metadata: Metadata, vocabulary: int, context: int) -> dict[str, str]:
    """Make the texts of tokenizer.json and tokenizer_config.json, by file name.

    Args:
        metadata: of the GGUF.
        vocabulary: rows of the embedding.
        context: most positions of the model.

    Raises:
        ModelError: a kind of tokenizer or pre-tokenizer that is not known, or a vocabulary that contradicts itself.

    """
    tokens, types = _vocabulary(metadata, vocabulary)
    kind = metadata.text("tokenizer.ggml.model")
    special = _special_tokens(metadata, tokens)
    # The library raises bare Exception if, say, a merge is not in the vocabulary.
    try:
        match kind:
            case "gpt2":
                tokenizer, adds_bos = _byte_level(metadata, tokens), _pre_tokenizer_name(metadata) in _BOS_BY_DEFAULT
            case "llama":
                tokenizer, adds_bos = _sentence_piece(metadata, tokens, types), True
            case _:
                raise ModelError(f"GGUF: tokenizer model {kind!r} is not supported (gpt2 and llama are)")
        _add_tokens(tokenizer, tokens, types)
        flags = {
            "add_bos_token": metadata.flag("tokenizer.ggml.add_bos_token", default=adds_bos) and "bos_token" in special,
            "add_eos_token": metadata.flag("tokenizer.ggml.add_eos_token", default=False) and "eos_token" in special,
        }
        _add_post_processor(tokenizer, special, flags)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001
        raise ModelError(f"GGUF: its tokenizer cannot be built: {' '.join(str(error).split())[:300]}") from None
    config = {**flags, **special, "clean_up_tokenization_spaces": False, "model_max_length": context}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _vocabulary(metadata: Metadata, rows: int) -> tuple[list[str], list[int]]:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    has_types = "tokenizer.ggml.token_type" in metadata
    types = metadata.integers("tokenizer.ggml.token_type") if has_types else [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens) or not 0 < len(tokens) <= rows:
        raise ModelError(f"GGUF: {len(tokens)} tokens, {len(types)} token types and {rows} embedding rows do not go together")
    if len(set(tokens)) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
        raise ModelError(f"GGUF: token {twice!r} is in the vocabulary twice: this file cannot be imported")
    return tokens, types


def _special_tokens(metadata: Metadata, tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {}
    for name, key in keys.items():
        token_id = metadata.optional_integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if token_id >= len(tokens):
            raise ModelError(f"GGUF: {key} token {token_id} is outside the vocabulary of {len(tokens)}")
        special[name] = tokens[token_id]
    return special


def _pre_tokenizer_name(metadata: Metadata) -> str:
    return metadata.text("tokenizer.ggml.pre", "default")


def _byte_level(metadata: Metadata, tokens: Sequence[str]) -> Tokenizer:
    """BPE over bytes, as GPT-2's."""
    name = _pre_tokenizer_name(metadata)
    merges = [_merge(merge) for merge in metadata.texts("tokenizer.ggml.merges")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _IGNORE_MERGES))
    tokenizer.pre_tokenizer = _pre_tokenizer(name, prefix=metadata.flag("tokenizer.ggml.add_space_prefix", default=False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise ModelError(f"GGUF: a merge must be two tokens with a space between them, found {merge[:80]!r}")
    return left, right


def _pre_tokenizer(name: str, *, prefix: bool) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if name in _DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    elif name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    else:
        known = ", ".join((*_GPT2, *_DIGITS, *_SPLITS))
        raise ModelError(f"GGUF: pre-tokenizer {name!r} is not known ({known} are): get the model's safetensors")
    return pre_tokenizers.Sequence(parts)


def _sentence_piece(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """BPE over characters with bytes as a last resort, as Llama 2's; a GGUF has scores instead of merges."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelError(f"GGUF: {len(tokens)} tokens have {len(scores)} scores")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges(vocab, scores, types)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Recover merges: all ways to put a token together from two others, the best-scored token first."""
    joinable = {token for token, token_id in vocab.items() if types[token_id] in (TokenType.NORMAL, TokenType.UNUSED)}
    found = []
    for token in joinable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                found.append((-scores[vocab[token]], vocab[token], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make those tokens known that are matched as a whole; control tokens are special, users' are not."""
    for kinds, special in (((TokenType.CONTROL, TokenType.UNKNOWN), True), ((TokenType.USER_DEFINED,), False)):
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds and token]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen])


def _add_post_processor(tokenizer: Tokenizer, special: Mapping[str, str], flags: Mapping[str, bool]) -> None:
    bos = special["bos_token"] if flags["add_bos_token"] else None
    eos = special["eos_token"] if flags["add_eos_token"] else None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token is not None],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None],
    )
