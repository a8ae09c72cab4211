"""The chosen experts of all rows: three launches and one copy, however many experts there are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from shardworker.kernels.cuda.device import products
from shardworker.kernels.cuda.routes import RouteFrame
from shardworker.kernels.cuda.tiles import COMMON, tiles_for
from shardworker.kernels.cuda.weights import stored

if TYPE_CHECKING:
    from shardworker.kernels.cuda.weights import CudaWeight

PRODUCT_BYTES = 256 << 20
"""Of rows' experts before they are summed: what goes beyond is done in parts."""

SUM_WIDTH = 256


def route_frame(rows: int, chosen: int, num_experts: int) -> RouteFrame:
    """The room of a step's routes, cut for the tiles that so many rows get."""
    return RouteFrame(rows, chosen, num_experts, tiles_for(rows).rows)


def rows_at_once(chosen: int, hidden: int) -> int:
    """Rows whose products fit into `PRODUCT_BYTES`."""
    return max(1, PRODUCT_BYTES // (chosen * hidden * torch.float32.itemsize))


def routed_experts(
    x: torch.Tensor, array: torch.Tensor, frame: RouteFrame, gate_up: CudaWeight, down: CudaWeight
) -> torch.Tensor:
    """Weighted sum of each row's experts, float32 [rows, hidden].

    Silu and the products between are float32, rounded once, to the dtype of `x`, before `down`. Sums run in ascending order
    of expert.

    Args:
        x: [rows, hidden].
        array: `frame`'s, on the device.
        frame: of these rows.
        gate_up: [experts, 2 * columns, hidden].
        down: [experts, hidden, columns].

    """
    rows, hidden = x.shape
    columns = down.num_inputs
    routes, tiles = frame.routes(array), tiles_for(rows)
    blocks = {"ROWS": tiles.rows, "OUTPUTS": tiles.outputs, "STEP": tiles.step, **tiles.options(x.dtype)}
    inner = x.new_empty((frame.num_slots, columns))
    values, scales, bits = stored(gate_up)
    products.gate_up[frame.num_tiles, math.ceil(2 * columns / tiles.outputs)](
        x,
        values,
        scales,
        inner,
        routes.order,
        routes.tile_experts,
        COLUMNS=columns,
        INPUTS=hidden,
        CHOSEN=frame.chosen,
        BITS=bits,
        **blocks,
    )
    products_of_slots = torch.empty((frame.num_slots, hidden), dtype=torch.float32, device=x.device)
    values, scales, bits = stored(down)
    products.down[frame.num_tiles, math.ceil(hidden / tiles.outputs)](
        inner,
        values,
        scales,
        products_of_slots,
        routes.order,
        routes.tile_experts,
        routes.slot_weights,
        HIDDEN=hidden,
        INPUTS=columns,
        BITS=bits,
        **blocks,
    )
    out = torch.empty((rows, hidden), dtype=torch.float32, device=x.device)
    products.add_up[rows, math.ceil(hidden / SUM_WIDTH)](
        products_of_slots, out, HIDDEN=hidden, CHOSEN=frame.chosen, WIDTH=SUM_WIDTH, **COMMON
    )
    return out
