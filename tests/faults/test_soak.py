"""A short soak; `make soak MINUTES=n SEED=s` does a long one."""

from __future__ import annotations

import pytest

from tests.faults.cuts import cut
from tests.faults.mesh import Mesh
from tests.faults.sizes import SETTLED_ROUNDS, Size
from tests.faults.soak import Soak, random_streams
from tests.faults.streams import Caller


@pytest.mark.asyncio(loop_scope="package")
async def test_a_few_rounds_change_nothing(mesh: Mesh, served: Caller) -> None:
    said: list[str] = []
    rounds: list[int] = []

    async def note() -> None:
        rounds.append(len(await mesh.serving(served)))

    soak = Soak(mesh, served, seed=2, numbers=(1, 2), say=said.append)
    await soak.run(60, most_rounds=5, after_round=note)
    await cut(served, 2)
    assert soak.wrong == [], said
    assert soak.rounds == len(said) == 5
    assert set(rounds) <= {1, 2}, "a round ends with a full mesh"
    assert min(soak.faults.total(), soak.reshards) > 0, said


def test_a_seed_gives_the_same_streams_again() -> None:
    assert random_streams(3) == random_streams(3)
    assert random_streams(3) != random_streams(4)


def test_growth_counts_from_when_a_process_had_settled() -> None:
    size = Size("worker")
    for rss_bytes in (10, 90, 95, 100, 120, 104):
        size.note(rss_bytes)
    assert SETTLED_ROUNDS == 4
    assert size.growth == pytest.approx(0.04)
