"""The sum of the shards' partials."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from protos.errors import InvalidArgument, WrongResult
from protos.tensors import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.tensor_pb2 import Tensor


def reduce_partials(partials: Sequence[Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Sum in float32, in shard order and never in order of arrival: the same mesh gives the same bits.

    Args:
        partials: one message of each shard, any wire dtype.
        shape: what each must be.

    Returns:
        f32 tensor of that shape.

    Raises:
        WrongResult: a partial of another shape or without its bytes, or a sum that is not finite.

    """
    total: torch.Tensor | None = None
    for shard, message in enumerate(partials):
        if tuple(message.shape) != shape:
            raise WrongResult(f"shard {shard} answered a partial of shape {list(message.shape)}, wanted {list(shape)}")
        try:
            partial = decode(message).float()
        except InvalidArgument as error:
            raise WrongResult(f"shard {shard} answered a partial that is none: {error}") from None
        # Not in place: a decoded float32 tensor is the message's own bytes.
        total = partial if total is None else total + partial
    if total is None:
        raise ValueError("there are no partials to sum")
    # One number tells almost always; only if it is not finite, which huge addends could cause too, each is looked at.
    if not math.isfinite(float(total.sum())) and not bool(torch.isfinite(total).all()):
        culprits = [shard for shard, message in enumerate(partials) if not bool(torch.isfinite(decode(message)).all())]
        raise WrongResult(f"the partials of shards {culprits or 'all'} sum to NaN or infinity")
    return total
