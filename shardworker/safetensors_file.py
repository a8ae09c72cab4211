"""Safetensors files on this worker: open ones, their checked headers, and reads of byte ranges."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Self

from protos.errors import ModelError
from protos.safetensors_header import LENGTH_BYTES, header_length, parse_header

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


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
            self.tensors = parse_header(self._read_header(), self.size, file=name, source=f"checkpoint file {name}")
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
        prefix = bytearray(min(LENGTH_BYTES, self.size))
        self.read_into(0, memoryview(prefix))
        header = bytearray(header_length(bytes(prefix), self.size, f"checkpoint file {self.name}"))
        self.read_into(LENGTH_BYTES, memoryview(header))
        return bytes(header)
