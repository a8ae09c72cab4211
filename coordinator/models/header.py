"""The header of a safetensors file: names, dtypes, shapes and places of its tensors.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON, then the data. Nothing
a header claims is believed before it was held against the file's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator.models.config import parse_object
from protos.errors import ModelError
from protos.fingerprint import file_fingerprint
from protos.plan_pb2 import CheckpointFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""

ITEM_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Every dtype of the format; which of them a model may use is the planner's concern."""

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 2**48
_SHOWN_CHARACTERS = 60


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


def read_header(directory: Path, name: str) -> tuple[CheckpointFile, list[TensorEntry]]:
    """Read and check the header of one file of a model's folder.

    Raises:
        ModelError: unreadable, foreign, truncated, or a header that contradicts itself or the file's size.

    """
    path = directory / name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            _check_length(path, size, length)
            header = file.read(length)
        fingerprint = file_fingerprint(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(header) != length:
        raise ModelError(f"{path} is truncated: its header needs {length} bytes, {len(header)} are left")
    start = _LENGTH_BYTES + length
    source = f"{path}: header"
    entries = [
        _entry(source, name, start, tensor, value)
        for tensor, value in parse_object(header, source).items()
        if tensor != "__metadata__"
    ]
    _check_tiling(path, entries, start, size)
    return CheckpointFile(name=name, size=size, fingerprint=fingerprint), entries


def _check_length(path: Path, size: int, length: int) -> None:
    if size < _LENGTH_BYTES:
        raise ModelError(f"{path} is no safetensors file: {size} bytes are too few")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path} is no safetensors file: its header would be {length} bytes long, at most {MAX_HEADER_BYTES} are read"
        )
    if length > size - _LENGTH_BYTES:
        raise ModelError(f"{path} is truncated: its header needs {length} bytes, {size - _LENGTH_BYTES} are left")


def _entry(source: str, file: str, start: int, tensor: str, value: object) -> TensorEntry:
    """Check one tensor of a header by itself."""
    fields = value if isinstance(value, dict) else {}
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ModelError(f"{source}: tensor {tensor!r} must have one of the dtypes {', '.join(ITEM_BITS)}, found {dtype!r}")
    shape, offsets = _as_sizes(fields.get("shape"), _MAX_DIMENSION), _as_sizes(fields.get("data_offsets"), 2**63)
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        found = repr(fields.get("shape"))[:_SHOWN_CHARACTERS]
        raise ModelError(f"{source}: tensor {tensor!r} must have a shape of up to {_MAX_DIMENSIONS} sizes, found {found}")
    if offsets is None or len(offsets) != 2:  # noqa: PLR2004
        found = repr(fields.get("data_offsets"))[:_SHOWN_CHARACTERS]
        raise ModelError(f"{source}: tensor {tensor!r} must have two data_offsets, found {found}")
    begin, end = offsets
    needed = -(-math.prod(shape) * ITEM_BITS[dtype] // 8)
    if end - begin != needed:
        raise ModelError(
            f"{source}: tensor {tensor!r} of {dtype} {list(shape)} needs {needed} bytes, its data_offsets [{begin}, {end}] "
            f"hold {end - begin}"
        )
    return TensorEntry(tensor, file, dtype, shape, start + begin, needed)


def _as_sizes(value: object, maximum: int) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    # Not isinstance: bool is a subclass of int.
    sizes = tuple(item for item in value if type(item) is int and 0 <= item <= maximum)
    return sizes if len(sizes) == len(value) else None


def _check_tiling(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    """Check that the tensors fill the file without overlap, hole or rest, as the format demands."""
    position, previous = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != position:
            what = "overlaps" if entry.offset < position else "leaves a hole after"
            raise ModelError(f"{path}: header: tensor {entry.name!r} {what} {previous}: download the model again")
        position, previous = entry.offset + entry.num_bytes, repr(entry.name)
    if size < position:
        raise ModelError(f"{path} is truncated: its tensors need {position} bytes, it has {size}: download the model again")
    if size > position:
        raise ModelError(f"{path} is damaged: its tensors end at byte {position}, it has {size}: download the model again")
