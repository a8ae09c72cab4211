"""The sum of the shards' partials."""

from __future__ import annotations

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
    total = torch.zeros(shape)
    for shard, message in enumerate(partials):
        if tuple(message.shape) != shape:
            raise WrongResult(f"shard {shard} answered a partial of shape {list(message.shape)}, wanted {list(shape)}")
        try:
            total += decode(message)
        except InvalidArgument as error:
            raise WrongResult(f"shard {shard} answered a partial that is none: {error}") from None
    if not bool(torch.isfinite(total).all()):
        culprits = [shard for shard, message in enumerate(partials) if not bool(torch.isfinite(decode(message)).all())]
        raise WrongResult(f"the partials of shards {culprits or 'all'} sum to NaN or infinity")
    return total
