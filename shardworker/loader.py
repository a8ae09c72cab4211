"""Fills a shard's weights from a checkpoint: only the plan's slices, by byte range, through a bounded staging buffer.

Peak memory is the final weights, the staging buffer and, where weights are quantized, a few blocks of an eighth of it in
float32. Where bytes come from is a `TensorSource`.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from protos.errors import ModelError, OutOfMemory, PlanMismatch
from protos.rpc import MAX_SUPPLY_BYTES
from shardworker.kernels.linear import DenseWeight
from shardworker.memory import device_memory
from shardworker.source import Folder, Pieces, Supplied
from shardworker.weights import META, Fill, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from protos.plan_pb2 import ShardPlan, TensorSlice
    from protos.safetensors_header import TensorEntry
    from shardworker.executor import OnDevice
    from shardworker.kernels.interface import Kernels
    from shardworker.source import Supplier, TensorSource
    from shardworker.weights import ShardWeights

STAGING_BYTES = MAX_SUPPLY_BYTES
"""One read at most."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RANDOM_POOL = 1 << 20
_RANDOM_DEVIATION = 0.02


class LoadCancelled(PlanMismatch):
    """Nobody waits for this load any more, or another plan took its place."""


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
    *,
    supplier: Supplier | None = None,
    on_device: OnDevice = lambda job: job(),
) -> tuple[ShardWeights, int]:
    """Take the memory and fill it; the weights and their bytes.

    Args:
        plan: that agrees with itself.
        directory: with the plan's files; of no meaning with random weights or a supplier.
        kernels: of the device.
        report: told of each block.
        is_cancelled: asked between two reads.
        supplier: who sends the files' bytes; None: they are read from `directory`.
        on_device: runs what needs the device, one block after the other; it may do something else between them.

    Raises:
        ModelError: a file or tensor is missing, damaged or different.
        OutOfMemory: the slice does not fit.
        LoadCancelled: `is_cancelled` said so, between two reads.

    """
    device = kernels.device
    _check_cancelled(is_cancelled)
    _check_memory(_num_bytes(plan, kernels), device)
    with ExitStack() as stack:
        source: TensorSource | None = None
        if supplier:
            source = Supplied(supplier, plan.files)
        elif not plan.random_weights:
            source = stack.enter_context(Folder(directory, plan.files))
        try:
            layout = Layout(plan, device, kernels)
        except RuntimeError as error:  # torch's allocators raise this, or a subclass
            raise OutOfMemory(f"the slice's memory cannot be had: {error}") from error
        done = 0
        report(Progress(0, layout.num_bytes))
        blocks = _random_blocks(layout.fills) if source is None else _stored_blocks(source, layout.fills)
        for fill, row, block in blocks:
            _check_cancelled(is_cancelled)
            done += on_device(partial(fill.target.store, row, block))
            report(Progress(done, layout.num_bytes))
    return layout.weights, layout.num_bytes


def _check_cancelled(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise LoadCancelled("the load was given up: its caller left, or another plan came")


def _num_bytes(plan: ShardPlan, kernels: Kernels) -> int:
    try:
        return Layout(plan, META, kernels).num_bytes
    except RuntimeError as error:  # a size of 64 bits and more
        raise OutOfMemory(f"the slice needs more bytes than can be counted: {error}") from error


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
    # One by one: a plan may speak of millions of experts without columns, which take no memory themselves.
    for name in (part.name.replace("{expert}", str(expert)) for expert in range(max(1, part.num_experts))):
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
    pitch = segment if segment >= source.smallest_piece else matrix.pitch
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
        pieces = Pieces(offset, span) if pitch == matrix.pitch else Pieces(offset, segment, count, matrix.pitch)
        source.read_into(matrix.stored.file, pieces, view[:span])
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
