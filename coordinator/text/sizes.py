"""How much text an operation of a chat template would make, estimated before it is done: upper bounds, roughly.

A list that holds another one twice, and that one a third twice, is small in memory and endless as text, in a comparison and in
a hash. So values are measured as trees, and counting stops beyond `MAX_TEXT`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import NamedTuple

MAX_TEXT = 16 * 2**20
"""Characters of the rendered prompt, and of any single text on the way to it."""

PASS = 64
"""What a container or anything without a known size counts."""

ELEMENT = 8
"""What a place in a container counts, besides what stands there."""

_MAX_DIGITS = 4300
"""Of a number that is read from a text; Python's own limit, which it does not apply to bases like 16."""
_MAX_PLACES = 1024
_TOO_MUCH = MAX_TEXT + 1


class Measure(NamedTuple):
    """Of a value."""

    size: int
    """Characters as text."""
    elements: int
    """Values in it, on all levels."""
    depth: int
    """Containers around the innermost of them."""


def measure(value: object) -> Measure:
    """Walk through a value as a tree, level by level."""
    if isinstance(value, str):
        return Measure(len(value), 1, 0)
    size, elements, depth, level = 0, 0, -1, [value]
    while level:
        depth += 1
        below: list[object] = []
        for item in level:
            elements += 1
            children = _children(item)
            size += _own_size(item) + ELEMENT * len(children)
            if size > MAX_TEXT:
                return Measure(size, elements, depth)
            below.extend(children)
        level = below
    return Measure(size, elements, depth)


def size_of(value: object) -> int:
    """Characters of a value as text."""
    return len(value) if isinstance(value, str) else measure(value).size


def whole(value: object) -> object:
    """Turn what can be read only once (the result of `map`) into a list, so that it can be measured first."""
    return list(value) if isinstance(value, Iterator) else value


def percent_size(template: str, values: object) -> int:
    """Of `"%9s" % values`: widths may be in the template or, for `*`, among the values."""
    widths = sum(int(digits) for digits in re.findall("[0-9]+", template))
    stars = [value for value in values if isinstance(value, int)] if "*" in template and isinstance(values, tuple) else []
    return len(template) + widths + sum(map(abs, stars)) + template.count("%") * size_of(values)


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        return list(value)
    return []


def _own_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return value.bit_length() // 3 + 1 if isinstance(value, int) else PASS


def _format_size(template: str, *values: object, **named: object) -> int:
    """Of `"{:9}".format(values)`; a width that is itself a field could be anything."""
    if re.search(r":[^{}]*\{", template):
        return _TOO_MUCH
    widths = sum(int(digits) for digits in re.findall("[0-9]+", template))
    return len(template) + widths + template.count("{") * size_of([*values, *named.values()])


def _percent_filter_size(template: object, *values: object, **named: object) -> int:
    return percent_size(str(template), values) + size_of(named)


def _string_size(value: object) -> int:
    return size_of(value)


def _json_size(value: object, *_: object, indent: object = None, separators: object = None, **__: object) -> int:
    found = measure(value)
    spaces = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    # Each element may stand on a line of its own, and each container's end on another one.
    return found.size + found.elements * (2 * (found.depth + 1) * max(spaces, 0) + size_of(separators))


def _padded_size(text: str, width: object = 0, *_: object, **__: object) -> int:
    return max(len(text), width) if isinstance(width, int) else 0


def _tabs_size(text: str, tabsize: object = 8) -> int:
    return len(text) + (text.count("\t") * tabsize if isinstance(tabsize, int) else 0)


def _replaced_size(text: object, old: object, new: object, *_: object, **__: object) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined_size(separator: str, pieces: object) -> int:
    return size_of(pieces) + (len(separator) * len(pieces) if isinstance(pieces, (list, tuple, str, dict)) else 0)


def _join_filter_size(pieces: object, separator: object = "", *_: object, **__: object) -> int:
    return _joined_size(str(separator), pieces)


def _indented_size(text: object, width: object = 4, *_: object, **__: object) -> int:
    text = str(text)
    return len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width if isinstance(width, int) else 0)


def _compared_size(text: object, sought: object = "", *_: object, **__: object) -> int:
    """Where each character of a text may be held against all of another one: no more text, but much work."""
    return len(str(text)) * (1 + len(sought) // PASS) if isinstance(sought, str) else len(str(text))


def _number_size(value: object, *_: object, **__: object) -> int:
    return _TOO_MUCH if isinstance(value, str) and len(value) > _MAX_DIGITS else 0


def _rounded_size(_: object, precision: object = 0, *__: object, **___: object) -> int:
    return _TOO_MUCH if isinstance(precision, int) and abs(precision) > _MAX_PLACES else 0


METHOD_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "ljust": _padded_size,
    "rjust": _padded_size,
    "zfill": _padded_size,
    "expandtabs": _tabs_size,
    "replace": _replaced_size,
    "join": _joined_size,
    "format": _format_size,
    "format_map": _format_size,
    "strip": _compared_size,
    "lstrip": _compared_size,
    "rstrip": _compared_size,
    "rfind": _compared_size,
    "rindex": _compared_size,
    "rpartition": _compared_size,
    "rsplit": _compared_size,
}
"""Upper bounds for the results of methods of a text that can make much text or work out of little."""

FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "format": _percent_filter_size,
    "indent": _indented_size,
    "int": _number_size,
    "join": _join_filter_size,
    "replace": _replaced_size,
    "round": _rounded_size,
    "string": _string_size,
    "tojson": _json_size,
    "trim": _compared_size,
}
"""The same of filters."""
