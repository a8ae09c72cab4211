"""The sandbox in which chat templates run: no way out of it, and an end to what they may use up.

A chat template is a program that came with the model's files, and it works on text that came with a request. jinja2's sandbox
keeps it away from Python; what it lacks is an account of work, without which three nested loops over `range(99999)` run for years
and a text doubled in a loop takes all memory. Here each pass of a loop, each call and each piece of text is booked.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from coordinator.text.sizes import FILTER_SIZES, MAX_TEXT, METHOD_SIZES, PASS, measure, percent_size, size_of, whole

MAX_WORK = 64 * 2**20
"""Characters that one rendering may produce in all, loops and calls counted at `PASS` each."""

MAX_SECONDS = 5.0
"""Wall time of one rendering."""

_MAX_EXPONENT = 1024

_USELESS_GLOBALS = ("cycler", "joiner", "lipsum")
_USELESS_FILTERS = ("batch", "pprint", "slice", "striptags", "sum", "urlize", "wordwrap", "xmlattr")
_USELESS_METHODS = frozenset({"encode", "maketrans", "striptags", "to_bytes", "translate", "unescape"})
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
        estimate = FILTER_SIZES.get(name)
        # jinja2's own filters may take the context first.
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def booked(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self.spend(PASS)
            if estimate:
                args = (*args[:skip], *map(whole, args[skip:]))
                _check(estimate(*args[skip:], **kwargs))
            return self.built(function(*args, **kwargs))

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
        self.spend(_check(size_of(value)))
        return value

    def built(self, value: Any) -> Any:  # noqa: ANN401
        """Book a value that was put together from others: each is bearable as text, and so are comparisons and hashes of it."""
        if isinstance(value, str):
            self.spend(_check(len(value)))
        elif isinstance(value, (list, tuple, Mapping)):
            found = measure(value)
            _check(found.size)
            self.spend(found.elements)
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401
        """Whether a template may have an attribute."""
        return attr not in _USELESS_METHODS and super().is_safe_attribute(obj, attr, value)

    def concatenate(self, *values: object) -> str:
        """Do what `~` does."""
        self.spend(_check(sum(map(size_of, values))))
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
        if isinstance(subject, str) and (estimate := METHOD_SIZES.get(function.__name__)):
            args = tuple(map(whole, args))
            _check(estimate(subject, *args, **kwargs))
        if isinstance(function, Macro) and (function.catch_varargs or function.catch_kwargs):
            # It sees them as a tuple or dict of its own.
            self.built([*args, *kwargs.values()])
        return self.built(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Calculate, if the result is of a bearable size."""
        match operator:
            case "*" if _is_sequence(left) or _is_sequence(right):
                many, times = (left, right) if _is_sequence(left) else (right, left)
                self.spend(_check(size_of(many) * max(times, 0)) if isinstance(times, int) else 0)
            case "+" if _is_sequence(left) and _is_sequence(right):
                self.spend(_check(size_of(left) + size_of(right)))
            case "%" if isinstance(left, str):
                self.spend(_check(percent_size(left, right)))
            case "*" | "**" if isinstance(left, int) and isinstance(right, int):
                _check_integers(left, right, operator)
        return super().call_binop(context, operator, left, right)


class _Booking(NodeTransformer):
    """Rewrites a template: passes of loops and macros book themselves and their constant text; what is built, books its size."""

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

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        # Of constants alone, it is no larger than the template.
        return _call("built", [node], node.lineno) if node.find(nodes.Name) else node

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        # In `for key, value in ...` it is no value.
        return self.visit_List(node) if node.ctx == "load" else node


def _call(method: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=lineno)


def _check(size: int) -> int:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes a text of more than {MAX_TEXT} characters")
    return size


def _is_sequence(value: object) -> bool:
    return isinstance(value, (str, list, tuple))


def _check_integers(left: int, right: int, operator: str) -> None:
    if (operator == "**" and right > _MAX_EXPONENT) or max(left.bit_length(), right.bit_length()) > _MAX_EXPONENT:
        raise SecurityError("it calculates with huge numbers")
