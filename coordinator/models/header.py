"""The header of one file of a model's folder, with what names the file in a plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from protos.errors import ModelError
from protos.fingerprint import file_fingerprint
from protos.model_files import open_model_file
from protos.plan_pb2 import CheckpointFile
from protos.safetensors_header import LENGTH_BYTES, TensorEntry, check_length, header_length, parse_header

if TYPE_CHECKING:
    from pathlib import Path


def read_header(directory: Path, name: str) -> tuple[CheckpointFile, dict[str, TensorEntry]]:
    """Read and check the header of one file of a model's folder; its tensors by name.

    Raises:
        ModelError: unreadable, foreign, truncated, a link out of the folder, or a header that contradicts itself or the
            file's size.

    """
    path = directory / name
    try:
        with os.fdopen(open_model_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(LENGTH_BYTES), size, str(path))
            header = file.read(length)
        fingerprint = file_fingerprint(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    check_length(length, len(header), str(path))
    entries = parse_header(header, size, file=name, source=str(path))
    return CheckpointFile(name=name, size=size, fingerprint=fingerprint), entries
