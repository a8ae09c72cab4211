"""A checkpoint in safetensors files, written as the values come: no tensor is ever whole in memory.

The library `safetensors` writes only tensors that are all in memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

INDEX = "model.safetensors.index.json"


def write_checkpoint(
    directory: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str,
    read: Callable[[str], Iterable[bytes]],
    *,
    max_bytes: int,
) -> list[Path]:
    """Write model.safetensors, or numbered parts with an index if it would be larger than `max_bytes`.

    Args:
        directory: an existing folder.
        shapes: of each tensor by name, in the order in which they are to be written.
        dtype: "F32", "BF16" or "F16".
        read: gives a tensor's bytes, row-major and little-endian, in pieces.
        max_bytes: of the tensors of one file; a larger tensor has a file for itself.

    Returns:
        The files written.

    """
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, shape in shapes.items()}
    parts = list(_parts(sizes, max_bytes))
    if len(parts) == 1:
        _write_file(directory / "model.safetensors", shapes, sizes, dtype, read)
        return [directory / "model.safetensors"]
    files = [directory / f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    for file, names in zip(files, parts, strict=True):
        _write_file(file, {name: shapes[name] for name in names}, sizes, dtype, read)
    weight_map = {name: file.name for file, names in zip(files, parts, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, directory / INDEX]


def _parts(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    part: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if part and filled + size > max_bytes:
            yield part
            part, filled = [], 0
        part.append(name)
        filled += size
    yield part


def _write_file(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    dtype: str,
    read: Callable[[str], Iterable[bytes]],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + sizes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            written = sum(out.write(piece) for piece in read(name))
            if written != sizes[name]:
                raise ModelError(f"tensor {name} must have {sizes[name]} bytes, found {written}")
