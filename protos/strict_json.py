"""JSON objects from files that nobody vouches for: config.json, indices, headers of safetensors files."""

from __future__ import annotations

import json

from protos.errors import ModelError

_SHOWN_CHARACTERS = 60


def parse_object(data: bytes, source: str) -> dict[str, object]:
    """Parse one JSON object of finite numbers and distinct keys.

    Raises:
        ModelError: not UTF-8, not JSON, NaN or Infinity, a key twice, not an object; `source` begins its text.

    """
    try:
        found: object = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{source} must hold a JSON object, found {show(found)}")
    return found


def show(value: object) -> str:
    """Write a value for a message: never the whole of what a hostile file holds."""
    try:
        text = json.dumps(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {show(key)} occurs twice")
        found[key] = value
    return found
