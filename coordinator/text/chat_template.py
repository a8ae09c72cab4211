"""A chat template: messages -> the text of the prompt that the model was trained on.

Templates are jinja2, kept with the tokenizer, and written against the environment that transformers gives them; this is that
environment, inside the bounds of `coordinator.text.limits`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace

from coordinator.text.limits import BoundedSandbox
from coordinator.text.sizes import MAX_TEXT
from protos.errors import InvalidArgument, ModelError
from protos.model_files import read_model_file

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2.parser import Parser

MAX_SOURCE = 2**17
"""Bytes of a template; the longest in use have a third of that. To compile one of names and commas takes 4 KiB a byte."""
_MAX_DEPTH = 32
_MAX_FORM = 256
_MAX_ERROR = 300


class ChatTemplate:
    """One compiled template. May be shared by threads; renderings wait for each other.

    Args:
        source: jinja2 text.
        special_tokens: spelling by name (`bos_token`, ...), which templates may use.

    Raises:
        ModelError: the text is no template.

    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._environment = _environment()
        self._lock = threading.Lock()
        if len(source) > MAX_SOURCE:
            raise ModelError(f"chat template has {len(source)} characters, at most {MAX_SOURCE} are read")
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"chat template, line {error.lineno}: {_line(error)}") from None
        # The compiler may fail on it in any way.
        except Exception as error:  # noqa: BLE001
            raise ModelError(f"chat template cannot be compiled: {_line(error)}") from None

    def render(self, messages: Sequence[Mapping[str, object]], /, **arguments: object) -> str:
        """Make the prompt's text.

        Args:
            messages: what JSON can hold; mostly `role` and `content`.
            arguments: further variables, such as `add_generation_prompt`, `tools` or `enable_thinking`.

        Raises:
            InvalidArgument: the template refuses these messages, fails on them, or does more than is allowed.

        """
        if "messages" in arguments:
            raise InvalidArgument("template argument 'messages' is the chat itself: use another name")
        given = {**self._special_tokens, "tools": None, "documents": None, **arguments}
        variables = {name: _plain(value) for name, value in given.items()} | {"messages": _plain(list(messages))}
        with self._lock:
            self._environment.begin()
            try:
                return "".join(_limited(self._template.generate(variables)))
            except SecurityError as error:
                raise InvalidArgument(f"the model's chat template is stopped: {_line(error)}") from None
            except jinja2.TemplateError as error:
                raise InvalidArgument(f"the model's chat template refuses these messages: {_line(error)}") from None
            # A template may fail like any program: whatever it is, it is about this request.
            except Exception as error:  # noqa: BLE001
                kind = type(error).__name__
                raise InvalidArgument(f"the model's chat template fails on these messages: {kind}: {_line(error)}") from None


def chat_template_source(directory: Path, config: Mapping[str, object], *, name: str = "default") -> str | None:
    """Find the text of a model's chat template: chat_template.jinja, tokenizer_config.json or chat_template.json.

    Args:
        directory: the model's folder.
        config: its tokenizer_config.json.
        name: which of several named ones.

    Raises:
        ModelError: a file that cannot be read.

    """
    sources: object = config.get("chat_template")
    try:
        if name == "default" and (file := directory / "chat_template.jinja").is_file():
            return read_model_file(file, MAX_SOURCE).decode()
        if sources is None and (file := directory / "chat_template.json").is_file():
            sources = json.loads(read_model_file(file, 4 * MAX_SOURCE)).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {_line(error)}") from None
    if isinstance(sources, str):
        return sources if name == "default" else None
    named = (
        {str(entry.get("name")): entry.get("template") for entry in sources or () if isinstance(entry, dict)}
        if isinstance(sources, list)
        else {}
    )
    source = named.get(name)
    return source if isinstance(source, str) else None


def _environment() -> BoundedSandbox:
    environment = BoundedSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_PlainNamespace
    )
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's way

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _PlainNamespace(Namespace):
    """`namespace(...)` without names that begin with an underscore, which could reach into Python."""

    def __init__(*args: object, **values: object) -> None:  # `self` may be a name in it, too
        self, given = args[0], dict(*args[1:], **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Namespaces may hold each other, and themselves.
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _make_dict(*args: object, **values: object) -> dict[str, object]:
    return dict(*args, **values)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_FORM:
        raise SecurityError(f"it writes the date in a form of more than {_MAX_FORM} characters")
    return datetime.now().strftime(form)  # noqa: DTZ005  # the date of whoever asks, as in transformers


def _to_json(
    value: object,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own would escape for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: object, depth: int = 0) -> object:
    """Rebuild a value from plain JSON types: what is not of them has no business in a template."""
    if depth > _MAX_DEPTH:
        raise InvalidArgument(f"chat messages and template arguments may be nested {_MAX_DEPTH} deep: found more")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item, depth + 1) for key, item in value.items()}
        case Sequence() if not isinstance(value, (bytes, bytearray)):
            return [_plain(item, depth + 1) for item in value]
    raise InvalidArgument(f"chat messages and template arguments hold what JSON can hold, found {type(value).__name__}")


def _limited(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_TEXT:
            raise SecurityError(f"the prompt has more than {MAX_TEXT} characters")
        yield piece


def _line(error: BaseException) -> str:
    """The error's text in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_ERROR else text[:_MAX_ERROR] + " ..."
