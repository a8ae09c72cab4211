"""Popularity of experts: every choice is counted, late ones more."""

import random
from array import array

import pytest

from coordinator.heat import HALF_LIFE, ExpertHeat


def chosen(*experts: int) -> bytes:
    return array("i", experts).tobytes()


def test_shares_are_of_the_layer_and_sum_to_one() -> None:
    heat = ExpertHeat({1: 4, 3: 2})
    heat.add(1, chosen(0, 1, 0, 2))
    heat.add(1, chosen(0, 3, 0, 1))
    layers = heat.layers()
    assert list(layers[1].shares) == pytest.approx([0.5, 0.25, 0.125, 0.125], rel=1e-3)
    assert layers[1].shares.sum() == pytest.approx(1)
    assert layers[1].imbalance == pytest.approx(2, rel=1e-3)
    assert layers[1].num_choices == 8
    assert layers[1].top_shares((1, 2, 4, 8)) == pytest.approx({1: 0.5, 2: 0.75}, rel=1e-3)
    assert (layers[3].num_choices, layers[3].imbalance, layers[3].shares.sum()) == (0, 0, 0)


def test_the_share_of_all_experts_is_not_told() -> None:
    heat = ExpertHeat({0: 4})
    heat.add(0, chosen(0, 1, 2, 3))
    assert heat.layers()[0].top_shares((2, 4, 8)) == pytest.approx({2: 0.5})


def test_no_choice_is_lost_whenever_it_is_counted() -> None:
    draw = random.Random(5)  # noqa: S311  # no secret
    heat, counts = ExpertHeat({0: 8}), [0] * 8
    for number in range(3000):
        experts = [draw.randrange(8) for _ in range(4)]
        for expert in experts:
            counts[expert] += 1
        heat.add(0, chosen(*experts))
        if number % 700 == 0:
            heat.layers()
    assert heat.layers()[0].num_choices == 12000
    assert list(heat.layers()[0].shares) == pytest.approx([count / 12000 for count in counts], abs=0.01)


def test_what_was_popular_long_ago_is_forgotten() -> None:
    heat = ExpertHeat({0: 2})
    for _ in range(HALF_LIFE // 1024):
        heat.add(0, chosen(*[0] * 1024))
    heat.layers()
    for _ in range(3 * HALF_LIFE // 1024):
        heat.add(0, chosen(*[1] * 1024))
    assert heat.layers()[0].shares[0] < 0.15


def test_the_hottest_are_those_furthest_over_the_mean_of_their_layer() -> None:
    heat = ExpertHeat({0: 2, 1: 8})
    heat.add(0, chosen(0, 0, 0, 1))
    heat.add(1, chosen(5, 5, 6, 7))
    hottest = heat.hottest(3)
    assert [(one.layer, one.expert) for one in hottest] == [(1, 5), (1, 6), (1, 7)]
    assert (hottest[0].share, hottest[0].over_mean) == pytest.approx((0.5, 4))
    # Who was never chosen is not hot.
    assert len(heat.hottest(100)) == 5
    assert ExpertHeat({}).hottest(3) == []
