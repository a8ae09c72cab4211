"""Safetensors files on this worker: open ones, their checked headers, and reads of byte ranges."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from protos.errors import ModelError
from protos.model_files import open_model_file
from protos.safetensors_header import LENGTH_BYTES, header_length, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from protos.safetensors_header import TensorEntry


READ_AHEAD_BYTES = 1 << 20


class SafetensorsFile:
    """One open file, its header parsed; a context manager."""

    def __init__(self, path: Path, name: str) -> None:
        """Open and check.

        Raises:
            ModelError: missing, no regular file, a link out of the folder, or no sound safetensors file.

        """
        self.name = name
        try:
            self._fd = open_model_file(path)
        except OSError as error:
            raise ModelError(f"cannot open checkpoint file {name} in {path.parent}: {error.strerror or error}") from error
        try:
            self.size = os.fstat(self._fd).st_size
            self.tensors = read_header(self.read_into, self.size, name)
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

    def read_ahead(self) -> None:
        """Have the system read the whole file into its page cache, as far as it has memory to spare."""
        # In pieces: one call reads as much as the device's read-ahead allows.
        for offset in range(0, self.size, READ_AHEAD_BYTES):
            os.posix_fadvise(self._fd, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def read_header(read_into: Callable[[int, memoryview], None], size: int, name: str) -> dict[str, TensorEntry]:
    """Read where a file's tensors are.

    Args:
        read_into: fills a buffer from an offset of the file.
        size: of the file, bytes.
        name: of the file.

    Raises:
        ModelError: no sound safetensors file; what `read_into` raises.

    """
    source = f"checkpoint file {name}"
    prefix = bytearray(min(LENGTH_BYTES, size))
    read_into(0, memoryview(prefix))
    header = bytearray(header_length(bytes(prefix), size, source))
    read_into(LENGTH_BYTES, memoryview(header))
    return parse_header(bytes(header), size, file=name, source=source)
