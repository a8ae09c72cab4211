"""The header of a GGUF file: metadata and the list of tensors.

Read here and not by the package `gguf`, whose reader believes every count in the file: on a damaged one it takes all memory or
runs for ever, and on a good one it needs seconds for the vocabulary. Constants and block formats are the package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_TENSOR_KINDS = {kind.value: kind for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file. `shape` is in the order of numpy and torch: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    """Of the first byte, from the beginning of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (last dimension)."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file whose header is sound and whose tensors lie inside it."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    data: NDArray[np.uint8]
    """The whole file, memory-mapped."""


class Metadata:
    """The key-value pairs, read with the type that is wanted.

    Each reader takes a default for a missing key; without one, a missing key is a ModelError, as is a value of another type.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = dict(values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """Read an integer that is not negative."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"GGUF: {key} must be a count, found {_short(value)}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Read an integer, or None if there is none."""
        return self.integer(key) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number, as the shortest decimal that float32 tells apart (1e-05, not 9.99999974e-06)."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(f"GGUF: {key} must be a number, found {_short(value)}")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        """Read a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ModelError(f"GGUF: {key} must be a text, found {_short(value)}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """Read a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"GGUF: {key} must be true or false, found {_short(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """Read an array of strings."""
        return [item for item in self._array(key, str) if isinstance(item, str)]

    def integers(self, key: str) -> list[int]:
        """Read an array of integers."""
        return [item for item in self._array(key, int) if isinstance(item, int)]

    def numbers(self, key: str) -> list[float]:
        """Read an array of floating-point numbers."""
        return [item for item in self._array(key, float) if isinstance(item, float)]

    def same(self, key: str, default: int | None = None) -> int:
        """Read a count that may be given once or for each layer; it must be equal in all layers."""
        value = self._values.get(key)
        if not isinstance(value, list):
            return self.integer(key, default)
        if len(set(value)) != 1:
            raise ModelError(f"GGUF: {key} differs between layers, which is not supported: found {_short(value)}")
        return Metadata({key: value[0]}).integer(key)

    def _array(self, key: str, kind: type) -> list[object]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise ModelError(f"GGUF: {key} must be an array of {kind.__name__}, found {_short(value)}")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key, default)
        if value is None:
            raise ModelError(f"GGUF: {key} is missing: the file does not say enough to be imported")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file and check its header.

    Raises:
        ModelError: not there, not GGUF, another version, truncated, or contradicting itself.

    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}") from None
    try:
        metadata, tensors = _read_header(data.data)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return GgufFile(path, metadata, tensors, data)


def _read_header(data: memoryview) -> tuple[Metadata, dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != _MAGIC:
        raise ModelError("not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        hint = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise ModelError(f"GGUF versions 2 and 3 are supported, found {hint}: convert the model anew")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    values: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in values:
            raise ModelError(f"GGUF: {key} is given twice")
        values[key] = cursor.value(cursor.scalar("I"))
    metadata = Metadata(values)
    alignment = metadata.integer("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if alignment == 0 or alignment & (alignment - 1):
        raise ModelError(f"GGUF: general.alignment must be a power of two, found {alignment}")
    infos = [cursor.tensor() for _ in range(num_tensors)]
    base = -(-cursor.position // alignment) * alignment
    return metadata, _placed(infos, base, len(data))


def _placed(infos: list[TensorInfo], base: int, size: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        tensor = TensorInfo(info.name, info.shape, info.kind, base + info.offset)
        if tensor.name in tensors:
            raise ModelError(f"GGUF: tensor {tensor.name} is listed twice")
        if (end := tensor.offset + tensor.num_bytes) > size:
            raise ModelError(f"truncated: tensor {tensor.name} ends at byte {end}, the file has {size}: download it again")
        tensors[tensor.name] = tensor
    return tensors


class _Cursor:
    """A position in the header. Nothing is believed that the rest of the file could not hold."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> memoryview:
        if count > len(self._data) - self.position:
            raise ModelError("truncated: the header is longer than the file: download it again")
        self.position += count
        return self._data[self.position - count : self.position]

    def scalar(self, form: str) -> Any:  # noqa: ANN401  # what the format says
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        data = self.take(self.scalar("Q"))
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"GGUF: a text at byte {self.position - len(data)} is not UTF-8") from None

    def value(self, number: int) -> object:
        kind = _kind(number)
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        return list(self._array(_kind(self.scalar("I")), self.scalar("Q")))

    def tensor(self) -> TensorInfo:
        name = self.text()
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ModelError(f"GGUF: tensor {_short(name)} must have 1 to {_MAX_DIMENSIONS} dimensions, found {dimensions}")
        shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
        number, offset = self.scalar("I"), self.scalar("Q")
        kind = _TENSOR_KINDS.get(number)
        if kind is None:
            raise ModelError(f"GGUF: tensor {_short(name)} is of type {number}, which is not known: update the package gguf")
        block, _ = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ModelError(
                f"GGUF: tensor {_short(name)} of type {kind.name} cannot have shape {list(shape)} (blocks of {block})"
            )
        return TensorInfo(name, shape, kind, offset)

    def _array(self, kind: GGUFValueType, count: int) -> Iterator[object]:
        if kind == GGUFValueType.ARRAY:
            raise ModelError("GGUF: an array of arrays is not supported")
        if kind == GGUFValueType.STRING:
            return (self.text() for _ in range(count))
        form = _SCALARS[kind]
        # The length is checked before anything of that length is made.
        return iter(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form))))


def _kind(number: int) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise ModelError(f"GGUF: value type {number} is not known: the file is damaged, or newer than this program") from None


def _short(value: object) -> str:
    text = repr(value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else text[:80] + "..."  # noqa: PLR2004  # a line
