"""A model's `config.json`, read with suspicion: every value is checked for type and range where it is asked for.

Knows no family and no meaning of a key, except for the two spellings of the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from protos.errors import ModelError
from protos.model_files import read_model_file
from protos.strict_json import parse_object, show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

MAX_SIZE = 2**24
"""Largest size of anything that is counted (heads, columns, tokens of a vocabulary) unless said otherwise."""
MAX_TEXT = 256
"""Characters of a name; messages show it."""
MAX_FILE_BYTES = 16 * 1024 * 1024
"""Largest configuration file that is read."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Config:
    """A JSON object with typed, checked access. null counts as absent.

    Every getter takes the key's spellings, the first that is present counts; without `default` the key is required. All
    raise `ModelError` naming the key, what was wanted and what was found.
    """

    source: str
    """What messages call it: "config.json", or "config.json: rope_scaling"."""
    values: Mapping[str, object]

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """Read an integer in [minimum, maximum]."""
        wanted = f"an integer in [{minimum}, {maximum}]"
        return self._get(keys, default, wanted, lambda value: _as_integer(value, minimum, maximum))

    def number(self, *keys: str, default: float | None = None, above: float = 0.0, maximum: float = 1e30) -> float:
        """Read a finite number, greater than `above` and at most `maximum`."""
        wanted = f"a number > {above:g} and <= {maximum:g}"
        return self._get(keys, default, wanted, lambda value: _as_number(value, above, maximum))

    def boolean(self, *keys: str, default: bool | None = None) -> bool:
        """Read true or false."""
        return self._get(keys, default, "true or false", lambda value: value if isinstance(value, bool) else None)

    def text(self, *keys: str, default: str | None = None) -> str:
        """Read a string of up to `MAX_TEXT` characters."""
        return self._get(keys, default, f"a string of up to {MAX_TEXT} characters", _as_text)

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of strings of up to `MAX_TEXT` characters; absent means none."""
        return self._get((key,), (), f"a list of strings of up to {MAX_TEXT} characters", _as_texts)

    def integers(self, *keys: str, minimum: int = 0, maximum: int = MAX_SIZE) -> tuple[int, ...]:
        """Read a list of integers in [minimum, maximum], or one of them; absent means none."""
        wanted = f"an integer in [{minimum}, {maximum}] or a list of them"
        return self._get(keys, (), wanted, lambda value: _as_integers(value, minimum, maximum))

    def section(self, key: str) -> Config | None:
        """Read an object; None if it is absent or empty."""
        nothing: dict[str, object] = {}
        found = self._get((key,), nothing, "an object", lambda value: value if isinstance(value, dict) else None)
        return Config(f"{self.source}: {key}", found) if found else None

    def refuse(self, key: str, instead: str) -> ModelError:
        """Make the error for a value that is well-formed and not supported."""
        return ModelError(f"{self.source}: {key} = {show(self.values.get(key))} is not supported: {instead}")

    @property
    def dtype(self) -> str | None:
        """The dtype that the config names in either spelling, for example "bfloat16"."""
        return self.text("dtype", "torch_dtype", default="") or None

    def _get(self, keys: Sequence[str], default: _T | None, wanted: str, convert: Callable[[object], _T | None]) -> _T:
        for key in keys:
            if self.has(key):
                value = convert(self.values[key])
                if value is None:
                    raise ModelError(f"{self.source}: {key} must be {wanted}, found {show(self.values[key])}")
                return value
        if default is None:
            raise ModelError(f"{self.source}: {' or '.join(keys)} is missing, it must be {wanted}")
        return default


def read_config(directory: Path) -> Config:
    """Read `config.json` of a model's folder.

    Raises:
        ModelError: the folder or file is missing or unreadable, or is not a JSON object.

    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a folder: a model is a folder with {CONFIG_FILE} and safetensors files")
    if not (directory / CONFIG_FILE).is_file():
        raise ModelError(f"{directory} has no {CONFIG_FILE}: a model is a folder with {CONFIG_FILE} and safetensors files")
    return Config(CONFIG_FILE, read_json(directory / CONFIG_FILE))


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """Read the tokens that end a completion: `eos_token_id` of generation_config.json, else of config.json; may be empty.

    Raises:
        ModelError: a file is damaged, or an id is not a token id.

    """
    path = directory / GENERATION_CONFIG_FILE
    if path.exists() and (stop_ids := eos_token_ids(Config(GENERATION_CONFIG_FILE, read_json(path)))):
        return stop_ids
    return eos_token_ids(read_config(directory))


def eos_token_ids(config: Config) -> tuple[int, ...]:
    """Read `eos_token_id`, a number or a list of them; duplicates are dropped."""
    return tuple(dict.fromkeys(config.integers("eos_token_id")))


def read_json(path: Path) -> dict[str, object]:
    """Read a file that holds one JSON object of finite numbers.

    Raises:
        ModelError: unreadable, too large, a link out of the folder, not UTF-8, not JSON, NaN or Infinity, not an object.

    """
    return parse_object(read_model_file(path, MAX_FILE_BYTES), str(path))


def _as_integer(value: object, minimum: int, maximum: int) -> int | None:
    # bool is a subclass of int: `true` is no number of layers.
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if minimum <= value <= maximum else None


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) and len(value) <= MAX_TEXT else None


def _as_number(value: object, above: float, maximum: float) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # Compared before conversion, so that an integer beyond float's range is no OverflowError.
    return float(value) if above < value <= maximum and math.isfinite(value) else None


def _as_integers(value: object, minimum: int, maximum: int) -> tuple[int, ...] | None:
    items = value if isinstance(value, list) else [value]
    found = tuple(number for item in items if (number := _as_integer(item, minimum, maximum)) is not None)
    return found if len(found) == len(items) else None


def _as_texts(value: object) -> tuple[str, ...] | None:
    items = value if isinstance(value, list) else [None]
    found = tuple(text for item in items if (text := _as_text(item)) is not None)
    return found if len(found) == len(items) else None
