import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coordinator.text.tokenizer import Tokenizer
from protos.errors import InvalidArgument, ModelError

TEXTS = ["", "the quick brown fox", "  two  spaces\n\n", "naïve 世界 🎉 12", "<s>the</s> fox<|user|>", "<think>日本 x", "\t\0"]

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello <s> & é"}]

Folder = Callable[..., Path]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_piece"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True, "eos_token": {"content": "</s>", "lstrip": False, "special": True, "__type": "AddedToken"}},
        {"pad_token": "<pad>", "additional_special_tokens": ["<extra>"]},
        {"add_bos_token": True, "bos_token": None},
    ],
)
def test_ids_equal_transformers(make_folder: Folder, kind: str, config: dict[str, Any]) -> None:
    folder = make_folder(kind, bos_by_processor=True, **config)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<pad><extra>x"]:
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.vocabulary == len(theirs)


def test_added_tokens_of_the_config_are_known(make_folder: Folder) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = Tokenizer.load(make_folder()).vocabulary
    folder = make_folder(added_tokens_decoder={str(number): {"content": "<new>", **flags}})
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a<new>b") == theirs("a<new>b").input_ids
    assert number in ours.encode("a<new>b")
    assert ours.detokenizer().push(number) == ""


def test_truncation_and_padding_of_the_file_do_not_apply(make_folder: Folder) -> None:
    folder = make_folder()
    content = json.loads((folder / "tokenizer.json").read_text())
    wanted = Tokenizer.load(folder).encode("the fox " * 20)
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(folder).encode("the fox " * 20) == wanted


@pytest.mark.parametrize("bos", [True, False])
def test_chat_ids_equal_transformers(make_folder: Folder, *, bos: bool) -> None:
    folder = make_folder(chat_template="{{ bos_token }}" * bos + CHATML, bos_by_processor=True)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.has_chat_template
    assert ours.encode_chat(MESSAGES, {}) == wanted


def test_the_beginning_token_of_a_template_is_not_doubled(make_folder: Folder) -> None:
    tokenizer = Tokenizer.load(make_folder(chat_template="{{ bos_token }}" + CHATML, bos_by_processor=True))
    ids = tokenizer.encode_chat([{"role": "user", "content": "x"}], {})
    (bos,) = tokenizer.encode("")
    assert ids.count(bos) == 1


def test_the_caller_may_ask_for_no_generation_prompt(make_folder: Folder) -> None:
    tokenizer = Tokenizer.load(make_folder(chat_template=CHATML))
    with_prompt, without = (tokenizer.encode_chat(MESSAGES, {"add_generation_prompt": flag}) for flag in (True, False))
    assert with_prompt[: len(without)] == without
    assert len(with_prompt) > len(without)


def test_of_named_templates_tools_choose_tool_use(make_folder: Folder) -> None:
    named = [{"name": "default", "template": "the fox"}, {"name": "tool_use", "template": "lazy {{ tools[0].name }}"}]
    folder = make_folder(chat_template=named)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for tools in (None, [{"name": "dog"}]):
        wanted = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=True, return_dict=False)
        assert ours.encode_chat(MESSAGES, {"tools": tools}) == wanted


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_a_file_of_its_own_is_found(make_folder: Folder, name: str) -> None:
    folder = make_folder()
    (folder / name).write_text(CHATML if name.endswith("jinja") else json.dumps({"chat_template": CHATML}))
    wanted = Tokenizer.load(make_folder(chat_template=CHATML)).encode_chat(MESSAGES, {})
    assert Tokenizer.load(folder).encode_chat(MESSAGES, {}) == wanted


def test_a_jinja_file_overrules_the_config(make_folder: Folder) -> None:
    folder = make_folder(chat_template="the fox")
    (folder / "chat_template.jinja").write_text("lazy dog")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_chat(MESSAGES, {}) == tokenizer.encode("lazy dog")


def test_a_model_without_template_refuses_chats(make_folder: Folder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidArgument, match="no chat template"):
        tokenizer.encode_chat(MESSAGES, {})


def test_a_text_that_is_not_unicode_is_refused(make_folder: Folder) -> None:
    with pytest.raises(InvalidArgument, match="lone surrogate at character 1"):
        Tokenizer.load(make_folder()).encode("a\ud800")


def test_detokenizers_of_one_tokenizer_are_independent(make_folder: Folder) -> None:
    tokenizer = Tokenizer.load(make_folder("byte_fallback"))
    first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
    ids = tokenizer.encode("the fox")
    texts = ["", ""]
    for token_id in ids:
        texts[0] += first.push(token_id)
        texts[1] += second.push(token_id)
    assert texts == ["the fox", "the fox"]


def test_ids_that_no_token_has_are_skipped(make_folder: Folder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    assert tokenizer.detokenizer().push(tokenizer.vocabulary + 7) == ""


def test_a_folder_without_tokenizer_is_no_error_until_text_is_needed(tmp_path: Path) -> None:
    assert Tokenizer.load_optional(tmp_path) is None
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be used"),
        ("tokenizer.json", "[]", r"tokenizer\.json cannot be used"),
        (
            "tokenizer.json",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}',
            "cannot be used",
        ),
        ("tokenizer.json", b"\xff\xfe\0", r"tokenizer\.json cannot be used"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "cannot be used"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": null}}', "cannot be used"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "chat template, line 1"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: cannot be read"),
        ("chat_template.json", "[]", r"chat_template\.json: cannot be read"),
    ],
)
def test_a_damaged_file_is_one_clear_line(make_folder: Folder, name: str, content: str | bytes, wanted: str) -> None:
    folder = make_folder()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=wanted) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
