"""Which rows an expert works on, in tiles: sorted by expert, so that its weights are read once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from shardworker.kernels.cuda.staging import staged

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 4
"""Integers in 16 bytes: where a piece of the array may begin."""


class Routes(NamedTuple):
    """Views of one array; a slot is row * chosen + place, where a row's experts are placed in ascending order."""

    order: torch.Tensor
    """int32 [tiles * tile_rows]: slots by expert, each expert's beginning a tile; -1: none."""
    tile_experts: torch.Tensor
    """int32 [tiles]; -1: no tile."""
    slot_weights: torch.Tensor
    """float32 [rows * chosen]."""


@dataclass(frozen=True, slots=True)
class RouteFrame:
    """How much room the routes of a step take."""

    rows: int
    chosen: int
    num_experts: int
    tile_rows: int

    @property
    def num_slots(self) -> int:
        """Products of a row and an expert."""
        return self.rows * self.chosen

    @property
    def num_tiles(self) -> int:
        """As many as there can be, however the rows are spread."""
        return min(self.num_slots, self.num_slots // self.tile_rows + min(self.num_experts, self.num_slots))

    @property
    def _ends(self) -> tuple[int, int, int]:
        """Of order, tile_experts and slot_weights in the array."""
        order = self.num_tiles * self.tile_rows
        tiles = order + -(-self.num_tiles // ALIGNMENT) * ALIGNMENT
        return order, tiles, tiles + self.num_slots

    def routes(self, array: torch.Tensor) -> Routes:
        """See the routes in an array from `fill`."""
        order, tiles, end = self._ends
        return Routes(array[:order], array[order : order + self.num_tiles], array[tiles:end].view(torch.float32))

    def fill(self, chosen: torch.Tensor, weights: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The array, on the CPU (pinned where the device is a GPU).

        Args:
            chosen: expert ids, [n, chosen], n <= rows, on the CPU, distinct within a row.
            weights: float32, likewise.
            device: that the array is for.

        """
        order_end, tiles_end, end = self._ends
        array, memory = staged(end, device)
        array[:tiles_end] = -1
        ids = chosen.numpy()
        ascending = np.argsort(ids, axis=1)
        slot_weights = array[tiles_end:].view(np.float32)
        slot_weights[: ids.size] = np.take_along_axis(weights.numpy(), ascending, 1).reshape(-1)
        slot_weights[ids.size :] = 0
        self._sort(np.take_along_axis(ids, ascending, 1).reshape(-1), array[:order_end], array[order_end:tiles_end])
        return memory

    def _sort(self, experts: NDArray[np.int32], order: NDArray[np.int32], tile_experts: NDArray[np.int32]) -> None:
        slots = np.argsort(experts, kind="stable")
        counts = np.bincount(experts, minlength=self.num_experts)
        tiles = -(-counts // self.tile_rows)
        # How far the tiles before an expert's put its slots beyond where they would stand without gaps.
        gaps = (np.cumsum(tiles) - tiles) * self.tile_rows - (np.cumsum(counts) - counts)
        order[np.arange(slots.size) + gaps[experts[slots]]] = slots
        used = np.repeat(np.arange(self.num_experts), tiles)
        tile_experts[: used.size] = used
