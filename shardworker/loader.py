"""Fills a shard's weights from a checkpoint: only the plan's slices, by byte range, through a bounded staging buffer.

Peak memory is the final weights, the staging buffer and, where weights are quantized, a few blocks of an eighth of it in
float32. Where bytes come from is a `TensorSource`, so that they may one day come from elsewhere than a folder.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch

from protos.errors import ModelError, OutOfMemory, PlanMismatch
from protos.fingerprint import file_fingerprint
from shardworker.kernels.linear import DenseWeight
from shardworker.memory import device_memory
from shardworker.safetensors_file import SafetensorsFile
from shardworker.weights import META, Fill, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from protos.plan_pb2 import ShardPlan, TensorSlice
    from protos.safetensors_header import TensorEntry
    from shardworker.kernels.interface import Kernels
    from shardworker.weights import ShardWeights

STAGING_BYTES = 8 << 20
"""One read at most."""

SEGMENT_BYTES = 64 << 10
"""From this length, the pieces of a column slice are read one by one; shorter ones together with what lies between them."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RANDOM_POOL = 1 << 20
_RANDOM_DEVIATION = 0.02


class LoadCancelled(PlanMismatch):
    """Nobody waits for this load any more, or another plan took its place."""


class TensorSource(Protocol):
    """Where a checkpoint's bytes come from."""

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor. Raises `ModelError` where there is none."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a file. Raises `ModelError` where that fails."""


class Folder:
    """A plan's safetensors files in a folder, verified against the plan; a context manager."""

    def __init__(self, directory: str, plan: ShardPlan) -> None:
        """Open and verify all files.

        Raises:
            ModelError: a file is missing, damaged, or not the one that the coordinator saw.

        """
        folder = Path(directory)
        if not directory or "\0" in directory or not folder.is_dir():
            raise ModelError(f"no folder {directory!r} on this worker: mount the model's files where the coordinator has them")
        self._tensors: dict[str, TensorEntry] = {}
        self._files: dict[str, SafetensorsFile] = {}
        with ExitStack() as stack:
            for wanted in plan.files:
                file = stack.enter_context(SafetensorsFile(folder / wanted.name, wanted.name))
                if file.size != wanted.size:
                    raise ModelError(f"checkpoint file {wanted.name} differs: wanted {wanted.size} bytes, found {file.size}")
                if _fingerprint(folder / wanted.name, wanted.name) != wanted.fingerprint:
                    raise ModelError(
                        f"checkpoint file {wanted.name} differs from the coordinator's: use the same files on all machines"
                    )
                if twice := next(iter(self._tensors.keys() & file.tensors.keys()), None):
                    raise ModelError(f"tensor {twice!r} is in two files: {self._tensors[twice].file} and {wanted.name}")
                self._tensors |= file.tensors
                self._files[wanted.name] = file
            self._close = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close.close()

    def find(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        if (tensor := self._tensors.get(name)) is None:
            raise ModelError(f"the checkpoint has no tensor {name!r} in its files {', '.join(self._files)}")
        return tensor

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a file."""
        self._files[file].read_into(offset, buffer)


def _fingerprint(path: Path, name: str) -> bytes:
    try:
        return file_fingerprint(path)
    except OSError as error:
        raise ModelError(f"checkpoint file {name} cannot be read: {error.strerror}") from error


class Matrix(NamedTuple):
    """A rectangle of a stored tensor of two dimensions, or of one plane of a stored tensor of three."""

    stored: TensorEntry
    offset: int
    """Of its first element in the file, bytes."""
    rows: int
    columns: int
    pitch: int
    """From one row to the next, bytes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Reported after each block: bytes in their final form."""

    loaded_bytes: int
    total_bytes: int


def load_weights(
    plan: ShardPlan,
    directory: str,
    kernels: Kernels,
    report: Callable[[Progress], None],
    is_cancelled: Callable[[], bool],
) -> tuple[ShardWeights, int]:
    """Take the memory and fill it; the weights and their bytes.

    Raises:
        ModelError: a file or tensor is missing, damaged or different.
        OutOfMemory: the slice does not fit.
        LoadCancelled: `is_cancelled` said so, between two reads.

    """
    device = kernels.device
    _check_cancelled(is_cancelled)
    _check_memory(Layout(plan, META, kernels).num_bytes, device)
    with ExitStack() as stack:
        source = None if plan.random_weights else stack.enter_context(Folder(directory, plan))
        try:
            layout = Layout(plan, device, kernels)
        except RuntimeError as error:  # torch's allocators raise this, or a subclass
            raise OutOfMemory(f"the slice's memory cannot be had: {error}") from error
        done = 0
        report(Progress(0, layout.num_bytes))
        blocks = _random_blocks(layout.fills) if source is None else _stored_blocks(source, layout.fills)
        for fill, row, block in blocks:
            _check_cancelled(is_cancelled)
            done += fill.target.store(row, block)
            report(Progress(done, layout.num_bytes))
    return layout.weights, layout.num_bytes


def _check_cancelled(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise LoadCancelled("the load was given up: its caller left, or another plan came")


def _check_memory(num_bytes: int, device: torch.device) -> None:
    wanted = num_bytes + STAGING_BYTES
    free = device_memory(device).free
    if wanted > free:
        raise OutOfMemory(
            f"the slice needs {wanted} bytes, {free} are free on this worker ({device.type}): use more workers or quantize"
        )


def _stored_blocks(source: TensorSource, fills: list[Fill]) -> Iterator[tuple[Fill, int, torch.Tensor]]:
    """Give (fill, row in its target, [n, columns] in the file's dtype); a block is valid until the next is asked for."""
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    for fill in fills:
        # Quantizing takes several float32 copies of a block.
        limit = STAGING_BYTES if isinstance(fill.target, DenseWeight) else STAGING_BYTES // 8
        for number, matrix in enumerate(_matrices(source, fill.part)):
            row = fill.row + number * fill.stride
            for block in _read_blocks(source, matrix, staging[:limit]):
                yield fill, row, block
                row += block.shape[0]


def _matrices(source: TensorSource, part: TensorSlice) -> Iterator[Matrix]:
    """Give the rectangles of a slice, in the order of the experts."""
    names = [part.name.replace("{expert}", str(e)) for e in range(part.num_experts)] or [part.name]
    for name in names:
        stored = source.find(name)
        if stored.shape != tuple(part.shape):
            raise ModelError(f"tensor {name!r} in {stored.file}: wanted shape {list(part.shape)}, found {list(stored.shape)}")
        if stored.dtype not in _DTYPES:
            raise ModelError(f"tensor {name!r} in {stored.file}: wanted dtype F32, BF16 or F16, found {stored.dtype}")
        # Vectors are [n, 1]; planes of three dimensions follow each other.
        shape = stored.shape if len(stored.shape) > 1 else (*stored.shape, 1)
        extents = [(extent.start, extent.end) for extent in part.ranges] + ([(0, 1)] if len(stored.shape) == 1 else [])
        (first_row, end_row), (first_column, end_column) = extents[-2:]
        planes = range(*extents[0]) if len(extents) > 2 else range(1)  # noqa: PLR2004
        item = _DTYPES[stored.dtype].itemsize
        for plane in planes:
            start = (plane * shape[-2] + first_row) * shape[-1] + first_column
            yield Matrix(stored, stored.offset + start * item, end_row - first_row, end_column - first_column, shape[-1] * item)


def _read_blocks(source: TensorSource, matrix: Matrix, staging: torch.Tensor) -> Iterator[torch.Tensor]:
    """Read a rectangle in blocks of whole rows, [n, columns]."""
    dtype = _DTYPES[matrix.stored.dtype]
    segment = matrix.columns * dtype.itemsize
    if matrix.rows == 0 or segment == 0:
        return
    # Bytes from a row's start to the next one's in the staging buffer.
    pitch = segment if segment >= SEGMENT_BYTES else matrix.pitch
    limit = staging.numel()
    if segment > limit:
        raise ModelError(f"tensor in {matrix.stored.file}: a row of {segment} bytes is longer than the staging buffer, {limit}")
    if pitch > limit:
        pitch = segment
    rows = (limit - segment) // pitch + 1
    view = staging.numpy().data
    for start in range(0, matrix.rows, rows):
        count = min(rows, matrix.rows - start)
        offset = matrix.offset + start * matrix.pitch
        span = (count - 1) * pitch + segment
        if pitch == matrix.pitch:
            source.read_into(matrix.stored.file, offset, view[:span])
        else:
            for i in range(count):
                source.read_into(matrix.stored.file, offset + i * matrix.pitch, view[i * segment : (i + 1) * segment])
        yield staging[:span].view(dtype).as_strided((count, matrix.columns), (pitch // dtype.itemsize, 1))


def _random_blocks(fills: list[Fill]) -> Iterator[tuple[Fill, int, torch.Tensor]]:
    """Ones for norms, otherwise normal deviates: cut from one pool at places that the slice's name and ranges decide."""
    pool = torch.randn(_RANDOM_POOL, generator=torch.Generator().manual_seed(0)) * _RANDOM_DEVIATION
    for fill in fills:
        shape = [extent.end - extent.start for extent in fill.part.ranges]
        rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], 1)
        if rows == 0 or columns == 0:
            continue
        if columns > _RANDOM_POOL:
            raise ModelError(f"tensor {fill.part.name!r}: {columns} columns are more than random weights can be drawn for")
        matrices = fill.part.num_experts or (shape[0] if len(shape) > 2 else 1)  # noqa: PLR2004
        place = int.from_bytes(hashlib.sha256(fill.part.SerializeToString(deterministic=True)).digest()[:8], "little")
        count = max(1, _RANDOM_POOL // 2 // columns)
        for number in range(matrices):
            for start in range(0, rows, count):
                n = min(count, rows - start)
                place = (place * 6364136223846793005 + 1442695040888963407) % (1 << 64)  # Knuth's MMIX generator
                cut = (place >> 32) % (_RANDOM_POOL - n * columns + 1)
                block = torch.ones(n, columns) if fill.is_norm else pool[cut : cut + n * columns].view(n, columns)
                yield fill, fill.row + number * fill.stride + start, block
