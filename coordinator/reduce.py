"""The sum of the shards' partials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos import tensor_pb2
from protos.errors import InvalidArgument, WrongResult
from protos.tensors import all_finite, decode

if TYPE_CHECKING:
    import torch

    from protos.tensor_pb2 import Tensor

_DTYPES = frozenset({tensor_pb2.DTYPE_F32, tensor_pb2.DTYPE_BF16, tensor_pb2.DTYPE_F16, tensor_pb2.DTYPE_INT8_BLOCK32})


class PartialSum:
    """A sum in float32, in shard order and never in order of arrival: the same mesh gives the same bits."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start without addends.

        Args:
            shape: what each partial must be.

        """
        self._shape = shape
        self._partials: list[torch.Tensor] = []
        self._total: torch.Tensor | None = None

    def add(self, message: Tensor) -> None:
        """Add the next shard's partial, of any wire dtype.

        Raises:
            WrongResult: it has another shape, not its bytes, or a dtype in which no partial is sent.

        """
        shard = len(self._partials)
        if message.dtype not in _DTYPES:
            raise WrongResult(f"shard {shard} answered a partial of dtype {message.dtype}", shards=(shard,))
        if tuple(message.shape) != self._shape:
            raise WrongResult(f"shard {shard} answered a partial of shape {list(message.shape)}, wanted {list(self._shape)}")
        try:
            partial = decode(message)
        except InvalidArgument as error:
            raise WrongResult(f"shard {shard} answered a partial that is none: {error}") from None
        self._partials.append(partial)
        if self._total is None:
            self._total = partial.float()
        elif shard == 1:
            # Not in place: the first one, in float32, is the message's own bytes.
            self._total = self._total + partial
        else:
            self._total += partial

    def total(self) -> torch.Tensor:
        """Give the sum, f32, not to be written to.

        Raises:
            WrongResult: it is not finite.

        """
        if self._total is None:
            raise ValueError("there are no partials to sum")
        if not all_finite(self._total):
            culprits = [shard for shard, partial in enumerate(self._partials) if not all_finite(partial.float())]
            raise WrongResult(f"the partials of shards {culprits or 'all'} sum to NaN or infinity", shards=tuple(culprits))
        return self._total
