import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from coordinator.gguf_import import import_gguf
from coordinator.gguf_import.header import read_gguf
from coordinator.gguf_import.tokenizer import tokenizer_files
from coordinator.text.tokenizer import Tokenizer
from protos.errors import ModelError
from tests.coordinator.tiny_gguf import VOCABULARY, Model, byte_level_vocabulary, sentence_piece_vocabulary
from tests.smollm2 import SMOLLM2_GGUF, needs_smollm2

TEXTS = [
    "",
    "the there  the\n\n  the",
    "def f(x):\n\treturn x + 12345\n",
    "naïve café 世界 🎉👨‍👩‍👧 नमस्ते",
    "It's we're I'LL don't",
    "<|start|>the<|end|><think>x",
    "a\u00a0b\u200bc\u0301",
]
# Pre-tokenizers that transformers tells apart, too.
OF_TRANSFORMERS = ["gpt-2", "llama-bpe", "qwen2", "tekken"]


@pytest.mark.parametrize("pre", OF_TRANSFORMERS)
def test_byte_level_ids_equal_transformers_own_reading(tmp_path: Path, pre: str) -> None:
    no_bos = {"add_bos": lambda w: w.add_add_bos_token(False)}
    Model(metadata=byte_level_vocabulary(pre) | no_bos).write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), Tokenizer.load(tmp_path / "out")
    for text in [*TEXTS, "1 22 333 4444", "  12\n\n1. x"]:
        assert ours.encode(text) == theirs(text).input_ids
        ids = ours.encode(text)
        stream = ours.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.flush() == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact"])
def test_digits_stand_alone_where_the_model_was_trained_so(tmp_path: Path, pre: str) -> None:
    Model(metadata=byte_level_vocabulary(pre)).write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    # The published tokenizer.json of SmolLM2: each digit by itself, then GPT-2's split.
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    wanted.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = Tokenizer.load(tmp_path / "out")
    for text in [*TEXTS, "1 22 333 4444", "  12\n\n1. x"]:
        assert ours.encode(text) == wanted.encode(text).ids
    assert len(ours.encode("1212")) == 4


def test_llama3_takes_a_word_of_the_vocabulary_whole_and_begins_with_bos(tmp_path: Path) -> None:
    Model(metadata=byte_level_vocabulary("llama-bpe", extra=["zebra"])).write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out")
    tokens = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert ours.encode("zebra") == [tokens["<|start|>"], tokens["zebra"]]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("spm")
    Model(metadata=sentence_piece_vocabulary()).write(folder / "m.gguf")
    import_gguf(folder / "m.gguf", folder / "out")
    return Tokenizer.load(folder / "out"), AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")


@given(text=st.text(st.sampled_from("the ab é🎉\n▁1"), max_size=30).filter(lambda text: not text.startswith((" ", "▁"))))
@settings(max_examples=300, deadline=None)
def test_sentence_piece_ids_equal_transformers_own_reading(sentence_piece: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = sentence_piece
    assert ours.encode(text) == theirs(text).input_ids


@given(text=st.text(st.sampled_from("the ab é🎉\n1"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_sentence_piece_text_comes_back(sentence_piece: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = sentence_piece
    stream = ours.detokenizer()
    assert "".join(map(stream.push, ours.encode(text))) + stream.flush() == text


def test_a_space_goes_before_each_text_between_special_tokens(sentence_piece: tuple[Tokenizer, Any]) -> None:
    ours, _ = sentence_piece
    alone = ours.encode("the")[1:]
    assert ours.encode("the</s>the")[1:] == [*alone, 2, *alone]


def test_without_a_space_prefix_there_is_none(tmp_path: Path) -> None:
    no_prefix = {"prefix": lambda w: w.add_add_space_prefix(False)}
    Model(metadata=sentence_piece_vocabulary() | no_prefix).write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    library = Library.from_file(str(tmp_path / "out/tokenizer.json"))
    assert library.encode("the the", add_special_tokens=False).tokens == ["the", "▁the"]
    assert library.decode(library.encode(" the").ids) == " the"


@pytest.mark.parametrize("load", [Tokenizer.load, AutoTokenizer.from_pretrained])
def test_the_chat_template_comes_along(tmp_path: Path, load: Any) -> None:
    Model().write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load(tmp_path / "out")
    chat = [{"role": "user", "content": "the"}]
    if isinstance(tokenizer, Tokenizer):
        ids = tokenizer.encode_chat(chat, {})
    else:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids == Tokenizer.load(tmp_path / "out").encode("<|start|>the<|end|>")


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
def test_tokens_that_the_file_asks_for_are_added(tmp_path: Path, flags: tuple[bool, bool]) -> None:
    bos, eos = flags
    asked = {"a": lambda w: w.add_add_bos_token(bos), "b": lambda w: w.add_add_eos_token(eos)}
    Model(metadata=asked).write(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    wanted = [1] * bos + [0] * eos
    assert Tokenizer.load(tmp_path / "out").encode("") == wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("").input_ids == wanted


REFUSED: list[tuple[dict[str, Any], str]] = [
    (byte_level_vocabulary("deepseek-llm"), "pre-tokenizer 'deepseek-llm' is not known"),
    ({"model": lambda w: w.add_tokenizer_model("t5")}, "tokenizer model 't5' is not supported"),
    ({"tokens": lambda w: w.add_token_list(["a"] * VOCABULARY)}, "'a' is in the vocabulary twice"),
    ({"tokens": lambda w: w.add_token_list(["a", "b"])}, "2 tokens, 300 token types and 300 embedding rows"),
    ({"tokens": lambda w: w.add_token_list([f"{i}" for i in range(400)]), "types": lambda _: None}, "400 tokens"),
    ({"tokens": lambda _: None}, r"tokenizer\.ggml\.tokens is missing"),
    ({"tokens": lambda w: w.add_uint32("tokenizer.ggml.tokens", 3)}, r"tokenizer\.ggml\.tokens must be an array of str"),
    ({"merges": lambda w: w.add_token_merges(["no such"])}, "tokenizer cannot be built"),
    ({"merges": lambda w: w.add_token_merges(["one"])}, "a merge must be two tokens"),
    ({"merges": lambda w: w.add_token_merges(["a b c"])}, "a merge must be two tokens"),
    ({"bos": lambda w: w.add_bos_token_id(5000)}, "bos token 5000 is outside the vocabulary"),
    ({"template": lambda w: w.add_uint32("tokenizer.chat_template", 1)}, r"tokenizer\.chat_template must be a text"),
    (sentence_piece_vocabulary() | {"scores": lambda w: w.add_token_scores([0.5])}, "300 tokens have 1 scores"),
]


@pytest.mark.parametrize(("metadata", "wanted"), REFUSED, ids=[wanted for _, wanted in REFUSED])
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any], wanted: str) -> None:
    Model(metadata=metadata).write(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=wanted) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@needs_smollm2
def test_smollm2_ids_and_prompts_equal_transformers_own_reading(tmp_path: Path) -> None:
    source = SMOLLM2_GGUF
    for name, text in tokenizer_files(read_gguf(source).metadata, 49152, 8192).items():
        (tmp_path / name).write_text(text)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert ours.vocabulary == len(theirs) == 49152
    for text in [*TEXTS, "In 2024, 3 of 12 cost $3.50 (10%).", "1. one\n2. two", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert ours.encode(text) == theirs(text).input_ids
    for chat in (["hi"], ["hi", "hello", "What is 2 + 2?"]):
        messages = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(chat)]
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.encode_chat(messages, {}) == wanted
    # Not so, because transformers knows no "smollm": two spaces before a digit are one token for the model, as in its training.
    assert [len(ours.encode("  1")), len(theirs("  1").input_ids)] == [2, 3]
