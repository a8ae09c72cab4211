"""How products are cut into tiles. Chosen by arithmetic (shared memory, full cache lines), not by measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FEW_ROWS = 64
"""Up to so many rows the tiles are the narrowest: reading weights takes the time, and a row has the same bits in any company."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Powers of two; one program computes `rows` times `outputs` elements, `step` inputs at a time."""

    rows: int
    outputs: int
    step: int
    warps: int

    def options(self, dtype: torch.dtype) -> dict[str, int | bool]:
        """What Triton's launch wants to know: how deep to prefetch, within 99 KiB of shared memory also in float32."""
        return {"num_warps": self.warps, "num_stages": 3 if dtype.itemsize <= torch.bfloat16.itemsize else 2, **COMMON}


COMMON: dict[str, int | bool] = {"enable_fp_fusion": True}
"""Of every launch."""

# Two warps: an instruction gives 16 x 8 elements, a third would expand the same weights again.
FEW = Tiles(rows=16, outputs=16, step=256, warps=2)
MANY = Tiles(rows=64, outputs=128, step=64, warps=4)


def tiles_for(num_rows: int) -> Tiles:
    """Narrow tiles for a decoding step, wide ones for a prompt."""
    return FEW if num_rows <= FEW_ROWS else MANY
