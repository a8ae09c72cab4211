"""Small tokenizers of the kinds that are in the wild, as the library builds them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

UNKNOWN = "<unk>"
SPECIAL = ["<s>", "</s>", "<|user|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x + 12", "naïve café 世界 🎉", "don't stop"] * 5


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("日本 ", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2, Mixtral."""
    characters = [*sorted(set("".join(CORPUS)) - {" ", "🎉", "世"}), "▁", "▁the", "▁▁", "fox", "<0xZZ>", "<0x4>"]
    vocab = {
        token: number
        for number, token in enumerate([UNKNOWN, *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters])
    }
    merges = [("t", "h")] if "th" in vocab else []
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece unigram, as newer files write it."""
    tokenizer = Tokenizer(
        models.Unigram(
            [(UNKNOWN, 0.0), ("▁", -2.0), ("▁the", -1.0), ("▁▁x", -3.0), ("fox", -2.0), *((c, -5.0) for c in "abcx")], 0
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT."""
    vocab = [UNKNOWN, "the", "##s", "##", "fox", "don", "'", "n't", "t", ".", "?", "do", "not", " do not"]
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(vocab)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_ends() -> Tokenizer:
    """GPT-1."""
    vocab = {token: number for number, token in enumerate(["a", "b</w>", "fox</w>", "</w>", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def no_decoder() -> Tokenizer:
    """Whole words."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "fox": 1, UNKNOWN: 2}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    kind.__name__: kind for kind in (byte_level, byte_fallback, metaspace, word_piece, word_ends, no_decoder)
}


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One tokenizer of each kind."""
    return KINDS[request.param]()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder with tokenizer files."""

    def make(kind: str = "byte_level", *, bos_by_processor: bool = False, **config: object) -> Path:
        tokenizer = KINDS[kind]()
        if bos_by_processor:
            bos = ("<s>", tokenizer.token_to_id("<s>"))
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | config))
        return tmp_path

    return make
