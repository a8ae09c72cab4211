"""A model's folder of safetensors files: one, or several with an index. No weight is read to open it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator.models.config import read_json
from coordinator.models.header import read_header
from protos.errors import ModelError
from protos.safetensors_header import MAX_NAME
from protos.strict_json import show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.plan_pb2 import CheckpointFile
    from protos.safetensors_header import TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Headers of a model's folder."""

    directory: Path
    files: tuple[CheckpointFile, ...]
    """Sorted by name."""
    tensors: Mapping[str, TensorEntry]
    """By name: of the single file all, of several those that the index names."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read and check the headers of `model.safetensors`, or else of the files of `model.safetensors.index.json`.

        Raises:
            ModelError: a file is missing, unreadable, truncated, or its header or the index is not what the format demands.

        """
        weight_map = _weight_map(directory)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
        files: list[CheckpointFile] = []
        tensors: dict[str, TensorEntry] = {}
        for name in names:
            file, entries = read_header(directory, name)
            files.append(file)
            tensors |= {key: entry for key, entry in entries.items() if weight_map is None or weight_map.get(key) == name}
        if missing := [tensor for tensor in weight_map or () if tensor not in tensors]:
            raise ModelError(
                f"{directory / INDEX_FILE} says that {(weight_map or {})[missing[0]]} holds {missing[0]!r}, but it does not"
                f"{_and_more(missing)}: download the model again"
            )
        return cls(directory, tuple(files), MappingProxyType(tensors))

    def read(self, name: str) -> bytes:
        """Read a whole tensor, meant for small ones.

        Raises:
            ModelError: there is no such tensor, or its file has become unreadable or shorter.

        """
        if name not in self.tensors:
            raise ModelError(f"{self.directory} has no tensor {name!r}")
        entry = self.tensors[name]
        path = self.directory / entry.file
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = os.pread(file.fileno(), entry.num_bytes, entry.offset)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
        wanted = next(file.size for file in self.files if file.name == entry.file)
        if size != wanted or len(data) != entry.num_bytes:
            raise ModelError(f"{path} has changed since its header was read: it had {wanted} bytes, found {size}")
        return data


def has_weights(directory: Path) -> bool:
    """Whether a folder holds the files that `Checkpoint.open` would read; they are not opened.

    Raises:
        ModelError: the index is damaged.

    """
    if not any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return False
    weight_map = _weight_map(directory)
    names = {SINGLE_FILE} if weight_map is None else set(weight_map.values())
    return all((directory / name).is_file() for name in names)


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Read the index: tensor -> file. None for a checkpoint of a single file."""
    path = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return None
    if not path.is_file():
        others = next((suffix for suffix in (".bin", ".pth", ".gguf") if any(directory.glob("*" + suffix))), None)
        hint = f"; its {others} files are of another format" if others else ""
        raise ModelError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}: only safetensors weights can be read")
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path} must hold a weight_map from tensors to files, found none")
    for tensor, name in found.items():
        if len(tensor) > MAX_NAME:
            raise ModelError(f"{path}: the name of a tensor has {len(tensor)} characters, at most {MAX_NAME} are read")
        if not isinstance(name, str) or not _is_plain_name(name):
            raise ModelError(f"{path}: the file of {tensor!r} must be a file name inside the folder, found {show(name)}")
    return found


def _is_plain_name(name: str) -> bool:
    if name in ("", ".", "..") or "\0" in name or len(name) > _MAX_FILE_NAME:
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more are missing)" if len(names) > 1 else ""
