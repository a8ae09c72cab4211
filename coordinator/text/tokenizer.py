"""Text or chat -> token ids, as the model's own tokenizer files say.

Only the edges of the service use it: the engine knows ids.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken

from coordinator.text.chat_template import ChatTemplate, chat_template_source
from coordinator.text.decoding import decoder_steps
from coordinator.text.detokenizer import Detokenizer
from protos.errors import InvalidArgument, ModelError
from protos.model_files import read_model_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_MAX_BYTES = 256 * 2**20
"""Of tokenizer.json: several times what the largest vocabularies take."""
_MAX_CONFIG_BYTES = 16 * 2**20

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer and chat template. Use `load`; may be shared by threads.

    Args:
        tokenizer: the library's, finished.
        templates: chat templates by name; "default" and "tool_use" count.

    Attributes:
        vocabulary: number of ids: the highest one plus 1.

    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, templates: Mapping[str, ChatTemplate]) -> None:
        self._tokenizer = tokenizer
        self._templates = dict(templates)
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._fresh_steps = decoder_steps(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
        self.vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model's folder.

        Raises:
            ModelError: a file is missing or damaged, or asks for something that is not supported.

        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{file} is missing: text needs it; give token ids instead, or complete the folder")
        config = _read_config(directory / "tokenizer_config.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(read_model_file(file, _MAX_BYTES))
            _configure(tokenizer, config)
        # The library raises bare Exception, and panics on some damaged files with a BaseException of its own.
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, ModelError)):
                raise
            raise ModelError(f"{file} cannot be used: {_line(error)}") from None
        special_tokens = dict(_named_tokens(config))
        sources = {name: chat_template_source(directory, config, name=name) for name in ("default", "tool_use")}
        templates = {name: ChatTemplate(source, special_tokens) for name, source in sources.items() if source is not None}
        return cls(tokenizer, templates)

    @classmethod
    def load_optional(cls, directory: Path) -> Tokenizer | None:
        """Do as `load`, but give None if the folder has no tokenizer.json: token ids work without."""
        return cls.load(directory) if (directory / "tokenizer.json").is_file() else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return "default" in self._templates

    def encode(self, text: str) -> list[int]:
        """Make the ids of a text, with the special tokens that the tokenizer adds by itself.

        Raises:
            InvalidArgument: the text is not Unicode (a lone surrogate).

        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, object]], arguments: Mapping[str, object]) -> list[int]:
        """Make the ids of a chat, up to where the assistant's answer begins.

        Args:
            messages: in order.
            arguments: further variables of the template; `add_generation_prompt` is true unless given.

        Raises:
            InvalidArgument: the model has no chat template, or it cannot render this chat.

        """
        if not self.has_chat_template:
            raise InvalidArgument("the model has no chat template: send text or token ids instead of messages")
        template = self._templates.get("tool_use" if arguments.get("tools") else "default", self._templates["default"])
        text = template.render(messages, **{"add_generation_prompt": True, **arguments})
        return self._encode(text, add_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """Begin the text of a completion."""
        return Detokenizer(self._spelling, self._fresh_steps())

    def _spelling(self, token_id: int) -> str | None:
        token = self._tokenizer.id_to_token(token_id)
        return None if token in self._special else token

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"text must be Unicode, found a lone surrogate at character {error.start}") from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _read_config(file: Path) -> Mapping[str, object]:
    try:
        config = json.loads(read_model_file(file, _MAX_CONFIG_BYTES)) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {_line(error)}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(config).__name__}")
    return config


def _configure(tokenizer: tokenizers.Tokenizer, config: Mapping[str, object]) -> None:
    """Do to the library's tokenizer what transformers does when it loads the same folder.

    As there, `add_bos_token` and `add_eos_token` do not count: which tokens are added is what tokenizer.json says.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    known = tokenizer.get_vocab()
    listed = config.get("added_tokens_decoder")
    added = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    tokenizer.add_tokens([token for token in (_added_token(value) for _, value in added) if token.content not in known])
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    named = [token for _, token in _named_tokens(config)] + _extra_tokens(config)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in named if token not in special])


def _named_tokens(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name in _NAMES:
        if (token := _spelling(config.get(name))) is not None:
            yield name, token


def _extra_tokens(config: Mapping[str, object]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    return [token for token in map(_spelling, values) if token is not None]


def _spelling(value: object) -> str | None:
    """A special token stands as a string, or as an object with its flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_token(value: Mapping[str, object]) -> AddedToken:
    flags = {flag: bool(value.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(str(value["content"]), **flags)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
