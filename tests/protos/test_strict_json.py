from __future__ import annotations

import pytest

from protos.errors import ModelError
from protos.strict_json import parse_object, show


def test_an_object_is_read() -> None:
    assert parse_object(b'{"a": [1, 2.5, null, "\xc3\xa4"]}', "f") == {"a": [1, 2.5, None, "\u00e4"]}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "f is not valid JSON"),
        (b"\xff{}", "f is not valid JSON"),
        (b"[" * 100_000, "f is not valid JSON"),
        (b'{"a": NaN}', "f is not valid JSON: NaN is not a JSON number"),
        (b'{"a": {"b": -Infinity}}', "f is not valid JSON: -Infinity is not a JSON number"),
        (b'{"a": {"b": 1, "b": 2}}', 'f is not valid JSON: key "b" occurs twice'),
        (b"[]", r"f must hold a JSON object, found \[\]"),
        (b"null", "f must hold a JSON object, found null"),
    ],
)
def test_anything_else_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ModelError, match=f"^{text}"):
        parse_object(data, "f")


def test_what_is_shown_is_short() -> None:
    assert show({"a": 1}) == '{"a": 1}'
    assert show("x" * 1000) == '"' + "x" * 56 + "..."
    assert show(10**5000) == "a number of thousands of digits"
