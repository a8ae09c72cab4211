"""The header of a safetensors file: names, dtypes, shapes and places of its tensors.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON, then the data. Nothing
a header claims is believed before it was held against the file's size. Coordinator and workers read files by the same rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import ModelError
from protos.strict_json import parse_object, show

if TYPE_CHECKING:
    from collections.abc import Iterable

LENGTH_BYTES = 8
"""Of what stands before the JSON text: its length."""

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""

# Bits of every dtype that the library writes; which of them a model may use is not this file's concern.
_DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}  # fmt: skip

MAX_NAME = 1024
"""Characters of a tensor's name: messages show it."""

_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 2**48
_MAX_OFFSET = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: row-major, little-endian, `num_bytes` bytes from `offset` of the file."""

    name: str
    file: str
    """Name inside the model's folder."""
    dtype: str
    """As safetensors spells it: "F32", "BF16", "F16", ..."""
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file, bytes."""
    num_bytes: int


def header_length(prefix: bytes, file_bytes: int, source: str) -> int:
    """Bytes of the JSON text, from the file's first `LENGTH_BYTES`.

    Raises:
        ModelError: foreign or truncated; `source` begins its text.

    """
    if file_bytes < LENGTH_BYTES:
        raise ModelError(f"{source} is no safetensors file: {file_bytes} bytes are too few")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{source} is no safetensors file: its header would be {length} bytes long, at most {MAX_HEADER_BYTES} are read"
        )
    check_length(length, file_bytes - LENGTH_BYTES, source)
    return length


def check_length(length: int, found: int, source: str) -> None:
    """Refuse a file that ends within its header.

    Raises:
        ModelError: fewer bytes are there than the header needs.

    """
    if found < length:
        raise ModelError(f"{source} is truncated: its header needs {length} bytes, {found} are left")


def parse_header(header: bytes, file_bytes: int, *, file: str, source: str) -> dict[str, TensorEntry]:
    """Read the JSON text; tensors must fill the rest of the file without overlap or hole, as the format demands.

    Args:
        header: the JSON text.
        file_bytes: of the whole file.
        file: its name, for the entries.
        source: what messages begin with.

    Raises:
        ModelError: a header that contradicts itself or the file's size.

    """
    start = LENGTH_BYTES + len(header)
    entries = {
        name: _entry(source, name, file, start, value)
        for name, value in parse_object(header, f"{source}: header").items()
        if name != "__metadata__"
    }
    _check_tiling(source, entries.values(), start, file_bytes)
    return entries


def _entry(source: str, name: str, file: str, start: int, value: object) -> TensorEntry:
    """Check one tensor of a header by itself."""
    if len(name) > MAX_NAME:
        raise ModelError(f"{source}: header: the name of a tensor has {len(name)} characters, at most {MAX_NAME} are read")
    where = f"{source}: header: tensor {name!r}"
    fields = value if isinstance(value, dict) else {}
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ModelError(f"{where} must have one of the dtypes {', '.join(_DTYPE_BITS)}, found {show(dtype)}")
    shape = _sizes(fields.get("shape"), _MAX_DIMENSION)
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise ModelError(f"{where} must have a shape of up to {_MAX_DIMENSIONS} sizes, found {show(fields.get('shape'))}")
    offsets = _sizes(fields.get("data_offsets"), _MAX_OFFSET)
    if offsets is None or len(offsets) != 2:  # noqa: PLR2004
        raise ModelError(f"{where} must have two data_offsets, found {show(fields.get('data_offsets'))}")
    begin, end = offsets
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        needed = bits / 8 if bits % 8 else bits // 8
        raise ModelError(
            f"{where} of {dtype} {list(shape)} needs {needed} bytes, its data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return TensorEntry(name, file, dtype, shape, start + begin, end - begin)


def _sizes(value: object, maximum: int) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    # Not isinstance: bool is a subclass of int.
    sizes = tuple(item for item in value if type(item) is int and 0 <= item <= maximum)
    return sizes if len(sizes) == len(value) else None


def _check_tiling(source: str, entries: Iterable[TensorEntry], start: int, file_bytes: int) -> None:
    position, previous = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != position:
            what = "overlaps" if entry.offset < position else "leaves a hole after"
            raise ModelError(f"{source}: header: tensor {entry.name!r} {what} {previous}: download the model again")
        position, previous = entry.offset + entry.num_bytes, repr(entry.name)
    if file_bytes < position:
        raise ModelError(
            f"{source} is truncated: its tensors need {position} bytes, it has {file_bytes}: download the model again"
        )
    if file_bytes > position:
        raise ModelError(
            f"{source} is damaged: its tensors end at byte {position}, it has {file_bytes}: download the model again"
        )
