"""The sandbox in which chat templates run: no way out of it, and an end to what they may use up.

A chat template is a program that came with the model's files, and it works on text that came with a request. jinja2's sandbox
keeps it away from Python; what it lacks is an account of work, without which three nested loops over `range(99999)` run for years
and a text doubled in a loop takes all memory. Here each pass of a loop, each call and each piece of text is booked.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEXT = 16 * 2**20
"""Characters of the rendered prompt, and of any single text on the way to it."""

MAX_WORK = 64 * 2**20
"""Characters that one rendering may produce in all, loops and calls counted at `PASS` each."""

MAX_SECONDS = 5.0
"""Wall time of one rendering."""

PASS = 64

_MAX_EXPONENT = 1024

_USELESS_GLOBALS = ("cycler", "joiner", "lipsum")
_USELESS_FILTERS = ("batch", "pprint", "slice", "sum", "urlize", "wordwrap", "xmlattr")
"""Of no use in a prompt, and a way to much work from little text."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """A jinja2 environment that books work. One rendering at a time: call `begin` before each."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  # jinja2's own
        super().__init__(finalize=self.book, **options)
        self.begin()
        for name in _USELESS_GLOBALS:
            self.globals.pop(name, None)
        for name in _USELESS_FILTERS:
            self.filters.pop(name, None)
        for name in self.filters:
            self.add_filter(name, self.filters[name])

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make a filter known whose work is booked."""
        estimate = _FILTER_SIZES.get(name)
        # jinja2's own filters may take the context first.
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def booked(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self.spend(PASS)
            if estimate:
                args = (*args[:skip], *map(_whole, args[skip:]))
                _check(estimate(*args[skip:], **kwargs))
            return self._booked(function(*args, **kwargs))

        self.filters[name] = booked

    def begin(self) -> None:
        """Open a new account."""
        self._work = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> bool:
        """Book work; always true, so that it can stand in a condition.

        Raises:
            SecurityError: too much of it, or too late.

        """
        self._work += work
        if self._work > MAX_WORK or time.monotonic() > self._deadline:
            raise SecurityError(f"it does more than {MAX_WORK} units of work, or takes more than {MAX_SECONDS:g} s")
        return True

    def book(self, value: object) -> object:
        """Book a value that becomes text."""
        self.spend(_check(_size(value)))
        return value

    def _booked(self, result: Any) -> Any:  # noqa: ANN401
        if _is_sequence(result):
            self.spend(_check(len(result)))
        return result

    def concatenate(self, *values: object) -> str:
        """Do what `~` does."""
        self.spend(_check(sum(map(_size, values))))
        return "".join(map(str, values))

    def from_string(  # type: ignore[override]  # narrower: a template is a text here
        self,
        source: str,
        globals: Any = None,  # noqa: A002, ANN401  # jinja2's name
        template_class: type[jinja2.Template] | None = None,
    ) -> jinja2.Template:
        """Compile a template whose loops and macros book their passes."""
        self.begin()  # constants are calculated now
        tree = _Booking().visit(self.parse(source)).set_environment(self)
        return super().from_string(tree, globals, template_class)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call a function, macro or method of a text."""
        self.spend(PASS)
        # The sandbox wraps `format`.
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(subject, str) and (estimate := _METHOD_SIZES.get(function.__name__)):
            args = tuple(map(_whole, args))
            _check(estimate(subject, *args, **kwargs))
        return self._booked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Calculate, if the result is of a bearable size."""
        match operator:
            case "*" if _is_sequence(left) or _is_sequence(right):
                many, times = (left, right) if _is_sequence(left) else (right, left)
                self.spend(_check(len(many) * max(times, 0)) if isinstance(times, int) else 0)
            case "+" if _is_sequence(left) and _is_sequence(right):
                self.spend(_check(len(left) + len(right)))
            case "%" if isinstance(left, str):
                self.spend(_check(_percent_size(left, right)))
            case "*" | "**" if isinstance(left, int) and isinstance(right, int):
                _check_integers(left, right, operator)
        return super().call_binop(context, operator, left, right)


class _Booking(NodeTransformer):
    """Rewrites a template: each pass of a loop or macro books itself with its constant text, and `~` books its result."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja2's name
        self.generic_visit(node)
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        booking = _call("spend", [nodes.Const(PASS + constant)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(booking, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(booking, node.test, lineno=node.lineno)
        return node

    visit_Macro = visit_CallBlock = visit_For  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)


def _call(method: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=lineno)


def _check(size: int) -> int:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes a text of more than {MAX_TEXT} characters")
    return size


def _size(value: object) -> int:
    """Characters of a value as text, roughly; counting stops beyond `MAX_TEXT`."""
    total, waiting = 0, [value]
    while waiting and total <= MAX_TEXT:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += PASS
            waiting.extend(itertools.chain.from_iterable(item.items()))
        elif isinstance(item, (list, tuple, set, frozenset)):
            total += PASS
            waiting.extend(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3 + 1
        else:
            total += PASS
    return total


def _whole(value: object) -> object:
    """Turn what can be read only once (the result of `map`) into a list, so that it can be measured first."""
    return list(value) if isinstance(value, Iterator) else value


def _is_sequence(value: object) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _check_integers(left: int, right: int, operator: str) -> None:
    if (operator == "**" and right > _MAX_EXPONENT) or max(left.bit_length(), right.bit_length()) > _MAX_EXPONENT:
        raise SecurityError("it calculates with huge numbers")


def _percent_size(template: str, values: object) -> int:
    """Of `"%9s" % values`: widths may be in the template or, for `*`, among the values."""
    widths = sum(int(digits) for digits in re.findall("[0-9]+", template))
    stars = [value for value in values if isinstance(value, int)] if "*" in template and isinstance(values, tuple) else []
    return len(template) + widths + sum(map(abs, stars)) + template.count("%") * _size(values)


def _format_size(template: str, *values: object, **named: object) -> int:
    """Of `"{:9}".format(values)`; a width that is itself a field could be anything."""
    if re.search(r":[^{}]*\{", template):
        return MAX_TEXT + 1
    widths = sum(int(digits) for digits in re.findall("[0-9]+", template))
    return len(template) + widths + template.count("{") * _size([*values, *named.values()])


def _percent_filter_size(template: object, *values: object, **named: object) -> int:
    return _percent_size(str(template), values) + _size(named)


def _string_size(value: object) -> int:
    return _size(value)


def _json_size(value: object, *_: object, indent: object = None, **__: object) -> int:
    spaces = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    return _size(value) * (1 + spaces // PASS) if spaces <= MAX_TEXT else spaces


def _padded_size(text: str, width: object = 0, *_: object, **__: object) -> int:
    return max(len(text), width) if isinstance(width, int) else 0


def _tabs_size(text: str, tabsize: object = 8) -> int:
    return len(text) + (text.count("\t") * tabsize if isinstance(tabsize, int) else 0)


def _replaced_size(text: object, old: object, new: object, *_: object, **__: object) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined_size(separator: str, pieces: object) -> int:
    return _size(pieces) + (len(separator) * len(pieces) if isinstance(pieces, (list, tuple, str, dict)) else 0)


def _join_filter_size(pieces: object, separator: object = "", *_: object, **__: object) -> int:
    return _joined_size(str(separator), pieces)


def _indented_size(text: object, width: object = 4, *_: object, **__: object) -> int:
    text = str(text)
    return len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width if isinstance(width, int) else 0)


_METHOD_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "ljust": _padded_size,
    "rjust": _padded_size,
    "zfill": _padded_size,
    "expandtabs": _tabs_size,
    "replace": _replaced_size,
    "join": _joined_size,
    "format": _format_size,
    "format_map": _format_size,
}
"""Upper bounds for the results of methods of a text that can make much out of little."""

_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "format": _percent_filter_size,
    "indent": _indented_size,
    "join": _join_filter_size,
    "replace": _replaced_size,
    "string": _string_size,
    "tojson": _json_size,
}
