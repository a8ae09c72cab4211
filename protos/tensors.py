"""`torch.Tensor` <-> `Tensor` message, without a copy where the dtype allows.

A message that does not hold what its dtype and shape claim is refused before any memory is taken for it.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch

from protos import tensor_pb2
from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 32
"""Elements of the last dimension that share one scale in `DTYPE_INT8_BLOCK32`, and the group size of quantized weights."""

_SMALLEST_NORMAL = 2.0**-126

MAX_DIMENSIONS = 4
MAX_DIMENSION = 2**31 - 1

TORCH_DTYPES = {
    tensor_pb2.DTYPE_F32: torch.float32,
    tensor_pb2.DTYPE_BF16: torch.bfloat16,
    tensor_pb2.DTYPE_F16: torch.float16,
    tensor_pb2.DTYPE_I32: torch.int32,
    tensor_pb2.DTYPE_F64: torch.float64,
}

# Received bytes are read-only; decoded tensors are only ever read, so torch's warning about them says nothing here.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


def encode(tensor: torch.Tensor, dtype: tensor_pb2.DType) -> tensor_pb2.Tensor:
    """Make the message for a CPU or device tensor, converted to `dtype` on the way.

    Args:
        tensor: any shape of 1 to 4 dimensions.
        dtype: the wire's dtype.

    """
    message = tensor_pb2.Tensor()
    encode_into(message, tensor, dtype)
    return message


def encode_into(message: tensor_pb2.Tensor, tensor: torch.Tensor, dtype: tensor_pb2.DType) -> None:
    """As `encode`, into an empty message where it stands: to move a message into another one copies its bytes.

    Args:
        message: a field of the message that is sent.
        tensor: any shape of 1 to 4 dimensions.
        dtype: the wire's dtype.

    """
    message.dtype = dtype
    message.shape.extend(tensor.shape)
    if tensor.numel():
        message.data = _encode_blocks(tensor) if dtype == tensor_pb2.DTYPE_INT8_BLOCK32 else _encode_plain(tensor, dtype)


def decode(message: tensor_pb2.Tensor) -> torch.Tensor:
    """Read a message; the result shares its bytes (int8 blocks become a new float32 tensor) and must not be written to.

    Raises:
        InvalidArgument: unknown dtype, or data that does not fit the shape.

    """
    # Lengths first: a hostile message may claim millions of dimensions.
    if not 1 <= len(message.shape) <= MAX_DIMENSIONS:
        raise InvalidArgument(f"a tensor needs 1 to {MAX_DIMENSIONS} dimensions, found {len(message.shape)}")
    shape = tuple(message.shape)
    if max(shape) > MAX_DIMENSION:
        raise InvalidArgument(f"a tensor's dimensions must be below 2^31, found shape {list(shape)}")
    # Read once: each access to a bytes field copies it.
    data = message.data
    if (wanted := num_bytes(message.dtype, shape)) != len(data):
        raise InvalidArgument(f"a tensor of shape {list(shape)} needs {wanted} bytes, found {len(data)}")
    if not data:
        return _empty(message.dtype, shape)
    if message.dtype == tensor_pb2.DTYPE_INT8_BLOCK32:
        return _decode_blocks(data, shape)
    return torch.frombuffer(data, dtype=TORCH_DTYPES[message.dtype]).view(shape)


def _empty(dtype: tensor_pb2.DType, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=TORCH_DTYPES.get(dtype, torch.float32))
    except RuntimeError:
        raise InvalidArgument(f"a tensor of shape {list(shape)} has no elements and impossible strides") from None


def num_bytes(dtype: tensor_pb2.DType, shape: Sequence[int]) -> int:
    """Bytes of a tensor on the wire.

    Raises:
        InvalidArgument: unknown dtype.

    """
    if dtype == tensor_pb2.DTYPE_INT8_BLOCK32:
        return math.prod(shape[:-1]) * math.ceil(shape[-1] / BLOCK) * (BLOCK + 2)
    if dtype not in TORCH_DTYPES:
        raise InvalidArgument(f"tensor dtype {dtype} is unknown")
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # One number tells almost always; only if it is not finite, which huge addends could cause too, each is looked at.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _encode_plain(tensor: torch.Tensor, dtype: tensor_pb2.DType) -> bytes:
    flat = tensor.detach().to(device="cpu", dtype=TORCH_DTYPES[dtype])
    if flat.dtype == torch.bfloat16:
        # numpy has no bfloat16, but bytes are bytes.
        flat = flat.contiguous().view(torch.int16)
    # In row-major order, however the tensor lies.
    return flat.numpy().tobytes()


def _encode_blocks(tensor: torch.Tensor) -> bytes:
    rows = tensor.detach().to(device="cpu", dtype=torch.float32).reshape(-1, tensor.shape[-1])
    if padding := -rows.shape[1] % BLOCK:
        rows = torch.nn.functional.pad(rows, (0, padding))
    blocks = rows.reshape(-1, BLOCK)  # [rows * blocks, 32]
    # bfloat16 keeps float32's range: a partial of any size survives. Values are rounded against the rounded scale, which is
    # off by 1/512 at most, so that none leaves its 8 bits.
    scales = blocks.abs().amax(dim=-1, keepdim=True).mul_(1 / 127).to(torch.bfloat16)
    # Below the normal numbers bfloat16 is too coarse for that: such blocks count as 0.
    scales.masked_fill_(scales < _SMALLEST_NORMAL, 0)
    inverse = scales.float().reciprocal_().masked_fill_(scales == 0, 0)
    values = (blocks * inverse).round_().to(torch.int8)
    return values.numpy().tobytes() + scales.view(torch.int16).numpy().tobytes()


def _decode_blocks(data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    rows, columns = math.prod(shape[:-1]), shape[-1]
    num_blocks = rows * math.ceil(columns / BLOCK)
    # The scales begin at an even address, for there are 32 values to each.
    values = torch.frombuffer(data, dtype=torch.int8, count=num_blocks * BLOCK).view(-1, BLOCK)
    scales = torch.frombuffer(data, dtype=torch.bfloat16, offset=num_blocks * BLOCK).view(-1, 1)
    decoded = values.float().mul_(scales).view(rows, -1)
    return decoded[:, :columns].reshape(shape)
