from __future__ import annotations

import pytest
import torch

from shardworker.kernels.cuda.routes import RouteFrame

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "chosen", "experts", "tile_rows"), [(1, 2, 4, 16), (5, 3, 7, 16), (40, 4, 4, 16), (9, 1, 100, 64)]
)
def test_every_slot_stands_once_in_a_tile_of_its_expert(rows: int, chosen: int, experts: int, tile_rows: int) -> None:
    ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(rows)])
    weights = torch.rand(rows, chosen)
    frame = RouteFrame(rows, chosen, experts, tile_rows)
    routes = frame.routes(frame.fill(ids, weights, CPU))
    ascending, places = ids.sort(1)
    assert torch.equal(routes.slot_weights.view(rows, chosen), weights.gather(1, places))
    assert sorted(slot for slot in routes.order.tolist() if slot >= 0) == list(range(rows * chosen))
    for tile, expert in zip(routes.order.view(-1, tile_rows).tolist(), routes.tile_experts.tolist(), strict=True):
        assert all(ascending.flatten()[slot] == expert for slot in tile if slot >= 0)
        assert (expert == -1) == all(slot < 0 for slot in tile)


def test_room_for_more_rows_stays_empty() -> None:
    ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.25, 0.75]])
    frame = RouteFrame(4, 2, 3, 16)
    routes = frame.routes(frame.fill(ids, weights, CPU))
    assert routes.slot_weights.tolist() == [0.75, 0.25, 0, 0, 0, 0, 0, 0]
    assert [slot for slot in routes.order.tolist() if slot >= 0] == [0, 1]
    assert routes.tile_experts.tolist() == [0, 2, -1]


def test_tiles_suffice_for_the_worst_spread() -> None:
    # Each expert but one has one row beyond whole tiles.
    ids = torch.tensor([[expert] for expert in (*[0] * 17, *[1] * 17, *[2] * 17)])
    frame = RouteFrame(51, 1, 3, 16)
    routes = frame.routes(frame.fill(ids, torch.ones(51, 1), CPU))
    assert routes.tile_experts.tolist() == [0, 0, 1, 1, 2, 2]
