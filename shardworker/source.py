"""Where a checkpoint's bytes come from: a folder that this worker sees, or the coordinator, which sends what it is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch

from protos.errors import ModelError, OutOfMemory
from protos.fingerprint import file_fingerprint
from protos.rpc import MAX_SUPPLY_BYTES
from shardworker.memory import device_memory
from shardworker.safetensors_file import SafetensorsFile, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from protos.plan_pb2 import CheckpointFile
    from protos.safetensors_header import TensorEntry


class Pieces(NamedTuple):
    """Equal pieces of a file at equal distances; all in bytes."""

    offset: int
    """Of the first."""
    length: int
    """Of each."""
    number: int = 1
    pitch: int = 0
    """From one's start to the next one's; of no meaning with one piece."""


class TensorSource(Protocol):
    """A checkpoint's tensors."""

    smallest_piece: int
    """Pieces shorter than this are better read together with what lies between them, bytes."""

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor. Raises `ModelError` where there is none."""

    def read_into(self, file: str, pieces: Pieces, buffer: memoryview) -> None:
        """Fill `buffer` with the pieces, one after the other. Raises `ModelError` where that fails."""


class Supplier(Protocol):
    """Whoever sends bytes of files."""

    def read(self, file: str, pieces: Pieces) -> bytes:
        """Give the pieces, one after the other. Raises `ModelError` where that fails."""

    def close(self) -> None:
        """Answer no more. Idempotent."""


class Tensors:
    """Where the tensors of several files are."""

    def __init__(self) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._files: list[str] = []

    def add(self, file: str, entries: dict[str, TensorEntry]) -> None:
        """Take a file's tensors.

        Raises:
            ModelError: one is in another file too.

        """
        if twice := next(iter(self._entries.keys() & entries.keys()), None):
            raise ModelError(f"tensor {twice!r} is in two files: {self._entries[twice].file} and {file}")
        self._entries |= entries
        self._files.append(file)

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor.

        Raises:
            ModelError: there is none.

        """
        if (tensor := self._entries.get(name)) is None:
            raise ModelError(f"the checkpoint has no tensor {name!r} in its files {', '.join(self._files)}")
        return tensor


class Folder:
    """A plan's safetensors files in a folder, verified against the plan; a context manager."""

    smallest_piece = 64 << 10

    def __init__(self, directory: str, files: Sequence[CheckpointFile]) -> None:
        """Open and verify all files.

        Raises:
            ModelError: a file is missing, damaged, or not the one that the coordinator saw.

        """
        if not _is_folder(directory):
            raise ModelError(f"no folder {directory!r} on this worker: mount the model's files where the coordinator has them")
        folder = Path(directory)
        self._tensors = Tensors()
        self._files: dict[str, SafetensorsFile] = {}
        with ExitStack() as stack:
            for wanted in files:
                file = stack.enter_context(SafetensorsFile(folder / wanted.name, wanted.name))
                if file.size != wanted.size:
                    raise ModelError(f"checkpoint file {wanted.name} differs: wanted {wanted.size} bytes, found {file.size}")
                if _fingerprint(folder / wanted.name, wanted.name) != wanted.fingerprint:
                    raise ModelError(
                        f"checkpoint file {wanted.name} differs from the coordinator's: use the same files on all machines"
                    )
                self._tensors.add(wanted.name, file.tensors)
                self._files[wanted.name] = file
            self._close = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close.close()

    def warm(self) -> int:
        """Bring all files into the page cache; give their bytes.

        Raises:
            OutOfMemory: they take more than half of the memory that is free: others would lose theirs.

        """
        wanted, free = sum(file.size for file in self._files.values()), device_memory(torch.device("cpu")).free
        if wanted > free // 2:
            raise OutOfMemory(f"the model's files are {wanted} bytes, wanted at most half of the {free} bytes that are free")
        for file in self._files.values():
            file.read_ahead()
        return wanted

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self._tensors.find(name)

    def read_into(self, file: str, pieces: Pieces, buffer: memoryview) -> None:
        """Fill `buffer` with the pieces, one after the other."""
        for i in range(pieces.number):
            part = buffer[i * pieces.length : (i + 1) * pieces.length]
            self._files[file].read_into(pieces.offset + i * pieces.pitch, part)


class Supplied:
    """A plan's safetensors files at whoever supplies them."""

    # The network carries no byte that is not asked for.
    smallest_piece = 0

    def __init__(self, supplier: Supplier, files: Sequence[CheckpointFile]) -> None:
        """Read the headers of all files.

        Raises:
            ModelError: a file is damaged, or cannot be had.

        """
        self._supplier = supplier
        self._tensors = Tensors()
        for file in files:
            self._tensors.add(file.name, read_header(self._reader(file.name), file.size, file.name))

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self._tensors.find(name)

    def read_into(self, file: str, pieces: Pieces, buffer: memoryview) -> None:
        """Fill `buffer` with the pieces, one after the other."""
        # Only a header can be longer than a message.
        most = len(buffer) if pieces.number > 1 else MAX_SUPPLY_BYTES
        for start in range(0, len(buffer), most):
            part = buffer[start : start + most]
            asked = pieces if pieces.number > 1 else Pieces(pieces.offset + start, len(part))
            data = self._supplier.read(file, asked)
            if len(data) != len(part):
                raise ModelError(f"checkpoint file {file}: wanted {len(part)} bytes at {asked.offset}, was sent {len(data)}")
            part[:] = data

    def _reader(self, file: str) -> Callable[[int, memoryview], None]:
        return lambda offset, buffer: self.read_into(file, Pieces(offset, len(buffer)), buffer)


def _is_folder(directory: str) -> bool:
    try:
        return bool(directory) and Path(directory).is_dir()
    except (OSError, ValueError):  # too long, not to be looked at, or no path at all
        return False


def _fingerprint(path: Path, name: str) -> bytes:
    try:
        return file_fingerprint(path)
    except OSError as error:
        raise ModelError(f"checkpoint file {name} cannot be read: {error.strerror}") from error
