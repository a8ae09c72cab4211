"""Sends a loading worker the bytes of the model's files that it asks for, so that one volume at the coordinator serves all."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from protos import rpc
from protos.errors import ModelError
from protos.model_files import open_model_file
from protos.shardworker_pb2 import SuppliedBytes, SupplyResponse

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from protos.plan_pb2 import CheckpointFile


class Supplier:
    """The files of one plan, open while workers load; a context manager."""

    def __init__(self, directory: Path, files: Iterable[CheckpointFile]) -> None:
        """Remember what may be asked for; entering the context opens it.

        Args:
            directory: of the files.
            files: of the plan; no other is ever read.

        """
        self._directory = directory
        self._files = {file.name: file.size for file in files}
        self._descriptors: dict[str, int] = {}
        self._close = ExitStack()

    def __enter__(self) -> Self:
        """Open all files.

        Raises:
            ModelError: one is gone.

        """
        with ExitStack() as stack:
            for name in self._files:
                try:
                    descriptor = open_model_file(self._directory / name)
                except OSError as error:
                    raise ModelError(f"{self._directory / name} cannot be read: {error.strerror or error}") from error
                stack.callback(os.close, descriptor)
                self._descriptors[name] = descriptor
            self._close = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self._close.close()

    async def answer(self, wanted: SupplyResponse) -> SuppliedBytes:
        """Read what a worker asks for, in a thread; what cannot be read is an answer too."""
        try:
            return SuppliedBytes(number=wanted.number, data=await asyncio.to_thread(self._read, wanted))
        except ModelError as error:
            return SuppliedBytes(number=wanted.number, error=str(error))

    def _read(self, wanted: SupplyResponse) -> bytes:
        file, length, count = wanted.file, wanted.length, wanted.count
        if file not in self._descriptors:
            raise ModelError(f"the plan has no file {file!r}")
        end = wanted.offset + (count - 1) * wanted.pitch + length
        sound = 1 <= count * length <= rpc.MAX_SUPPLY_BYTES and (count == 1 or wanted.pitch >= length)
        if not sound or end > self._files[file]:
            raise ModelError(
                f"checkpoint file {file}: {count} pieces of {length} bytes, {wanted.pitch} apart from {wanted.offset}, are not "
                f"in its {self._files[file]} bytes, or more than {rpc.MAX_SUPPLY_BYTES}"
            )
        return b"".join(self._piece(file, wanted.offset + i * wanted.pitch, length) for i in range(count))

    def _piece(self, file: str, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._descriptors[file], length, offset)
        except OSError as error:
            raise ModelError(f"checkpoint file {file} cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise ModelError(f"checkpoint file {file} became shorter: {length} bytes at {offset} wanted, {len(data)} left")
        return data
