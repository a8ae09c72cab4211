"""The tensors that a round brings, checked against what the shard and the step want before anything is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from protos import shardworker_pb2 as pb
from protos import tensor_pb2
from protos.errors import InvalidArgument
from protos.tensors import all_finite, decode
from shardworker.shard import Routing

if TYPE_CHECKING:
    from shardworker.shard import Shard


def hidden_rows(shard: Shard, message: tensor_pb2.Tensor, num_rows: int) -> torch.Tensor:
    """[rows, hidden] on the device in the dtype of the arithmetic.

    Raises:
        InvalidArgument: it is not that.

    """
    if message.dtype in (tensor_pb2.DTYPE_I32, tensor_pb2.DTYPE_F64):
        raise InvalidArgument(f"hidden: wanted F32, BF16, F16 or INT8_BLOCK32, found {tensor_pb2.DType.Name(message.dtype)}")
    return checked_tensor(message, "hidden", None, (num_rows, shard.hidden)).to(shard.device, shard.dtype)


def any_rows(shard: Shard, message: tensor_pb2.Tensor) -> torch.Tensor:
    """As `hidden_rows`, of as many rows as there are, but at least one."""
    num_rows = message.shape[0] if message.shape else 0
    if num_rows == 0:
        raise InvalidArgument("hidden: wanted at least one row")
    return hidden_rows(shard, message, num_rows)


def checked_tensor(message: tensor_pb2.Tensor, name: str, dtype: tensor_pb2.DType | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Decode a tensor on the CPU.

    Raises:
        InvalidArgument: another dtype (unless None is wanted, which is any) or shape, data that does not fit, or, with a
            dtype wanted, a number that is not finite.

    """
    if len(message.shape) != len(shape) or tuple(message.shape) != shape or (dtype is not None and message.dtype != dtype):
        wanted = f"{list(shape)}" if dtype is None else f"{tensor_pb2.DType.Name(dtype)} {list(shape)}"
        raise InvalidArgument(f"{name}: wanted {wanted}, found dtype {message.dtype} {message.shape[:8]}")
    tensor = decode(message)
    if dtype == tensor_pb2.DTYPE_F32 and not all_finite(tensor):
        raise InvalidArgument(f"{name}: wanted finite numbers, found NaN or infinity")
    return tensor


def routing_of(shard: Shard, action: pb.FeedForward, num_rows: int) -> Routing | None:
    """Where the rows go; none in dense layers.

    Raises:
        InvalidArgument: what came does not suit the layer, or experts are out of range or not distinct.

    """
    num_experts = shard.num_experts(action.layer)
    fields = (action.HasField("experts"), action.HasField("expert_weights"))
    if fields != ((True, True) if num_experts else (False, False)):
        raise InvalidArgument(f"layer {action.layer}: `experts` and `expert_weights` come in MoE layers and only there")
    if action.HasField("shared_weights") and not shard.has_shared_expert(action.layer):
        raise InvalidArgument(f"layer {action.layer} has no shared expert to weigh")
    if not num_experts:
        return None
    k = action.experts.shape[-1] if action.experts.shape else 0
    chosen = checked_tensor(action.experts, "experts", tensor_pb2.DTYPE_I32, (num_rows, k))
    weights = checked_tensor(action.expert_weights, "expert_weights", tensor_pb2.DTYPE_F32, (num_rows, k))
    _check_chosen(chosen, num_experts)
    shared = None
    if action.HasField("shared_weights"):
        shared = checked_tensor(action.shared_weights, "shared_weights", tensor_pb2.DTYPE_F32, (num_rows,))
    return Routing(chosen, weights, shared)


def _check_chosen(chosen: torch.Tensor, num_experts: int) -> None:
    if chosen.shape[1] == 0:
        raise InvalidArgument("experts: wanted at least one for each row")
    for row in chosen.tolist():
        if len(set(row)) != len(row) or min(row) < 0 or max(row) >= num_experts:
            raise InvalidArgument(f"experts: wanted distinct ids below {num_experts}, found {row}")
