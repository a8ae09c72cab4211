"""Headers of safetensors files, believed only after they were checked, and reads of byte ranges.

A file is 8 bytes of header length (little-endian), a JSON object of name to {dtype, shape, data_offsets}, and the data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

# Bits of each dtype that the library writes; only some can be computed with (`shardworker.loader`).
_DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class SafetensorsFile:
    """One open file, its header parsed; a context manager."""

    def __init__(self, path: Path, name: str) -> None:
        """Open and check.

        Raises:
            ModelError: missing, no regular file, or no sound safetensors file.

        """
        self.name = name
        try:
            # Not blocking: a pipe by that name must not hang the worker.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelError(f"cannot open checkpoint file {name} in {path.parent}: {reason}") from error
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"checkpoint file {name} is not a regular file")
            self.size = status.st_size
            self.tensors = parse_header(self._read_header(), name, self.size)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file.

        Raises:
            ModelError: the file ends early, or cannot be read.

        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise ModelError(
                    f"checkpoint file {self.name} cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                wanted = offset + len(buffer)
                raise ModelError(f"checkpoint file {self.name} is truncated: wanted bytes up to {wanted}, found {offset + done}")
            done += count

    def _read_header(self) -> bytes:
        if self.size < _LENGTH_BYTES:
            raise ModelError(f"checkpoint file {self.name} is truncated: {self.size} bytes are no safetensors file")
        prefix = bytearray(_LENGTH_BYTES)
        self.read_into(0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > min(self.size - _LENGTH_BYTES, MAX_HEADER_BYTES):
            raise ModelError(
                f"checkpoint file {self.name} is truncated or no safetensors file: its header claims {length} bytes, "
                f"the file has {self.size}"
            )
        header = bytearray(length)
        self.read_into(_LENGTH_BYTES, memoryview(header))
        return bytes(header)


def parse_header(header: bytes, file: str, file_size: int) -> dict[str, StoredTensor]:
    """Read the JSON text; tensors must fill the data without a hole or an overlap, as the safetensors library demands.

    Args:
        header: the JSON text.
        file: name, for messages and results.
        file_size: bytes of the whole file.

    Raises:
        ModelError: anything else.

    """
    try:
        entries = json.loads(header, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"checkpoint file {file} has no sound safetensors header: {error}") from error
    if not isinstance(entries, dict):
        raise ModelError(f"checkpoint file {file} has no sound safetensors header: not a JSON object")
    start = _LENGTH_BYTES + len(header)
    ends: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            dtype, shape, begin, end = _entry(name, entry, file)
            ends.append((begin, end, name))
            tensors[name] = StoredTensor(file, dtype, shape, start + begin)
    _check_layout(sorted(ends), file, file_size - start)
    return tensors


def _check_layout(spans: list[tuple[int, int, str]], file: str, data_bytes: int) -> None:
    for (_, end, before), (begin, _, name) in itertools.pairwise([(0, 0, "the header"), *spans]):
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a hole after"
            raise ModelError(
                f"checkpoint file {file} lies: tensor {name!r} at byte {begin} {kind} {before!r}, which ends at {end}"
            )
    wanted = spans[-1][1] if spans else 0
    if wanted != data_bytes:
        kind = "is truncated" if data_bytes < wanted else "is longer than its header says"
        raise ModelError(f"checkpoint file {file} {kind}: wanted {wanted} bytes of data, found {data_bytes}")


def _entry(name: str, entry: object, file: str) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape and range of one tensor, relative to the data."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if dtype in _DTYPE_BITS and all(
            _is_count(n) for n in (*shape, begin, end)
        ):
            bits = math.prod(shape) * _DTYPE_BITS[dtype]
            if (end - begin) * 8 == bits:
                return dtype, tuple(shape), begin, end
            raise ModelError(
                f"checkpoint file {file} lies: tensor {name!r}, {dtype} of shape {shape}, needs {bits / 8:g} bytes, "
                f"its offsets span {end - begin}"
            )
        case _:
            raise ModelError(f"checkpoint file {file} has an unsound entry for tensor {name!r}: {str(entry)[:200]}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of a header")


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries
