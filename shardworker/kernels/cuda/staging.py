"""Integers on their way to the GPU: through pinned memory, so that nothing waits for the copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def staged(count: int, device: torch.device) -> tuple[NDArray[np.int32], torch.Tensor]:
    """Take memory for `count` integers, twice seen: to write in, and to copy from with `non_blocking`.

    torch gives pinned memory to others only when the copies from it are done.
    """
    memory = torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")
    array: NDArray[Any] = memory.numpy()
    return array, memory
