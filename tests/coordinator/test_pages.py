"""Page accounting: every page is free or taken by one, never both."""

import random

import pytest

from coordinator.pages import PagePool


@pytest.mark.parametrize("seed", range(5))
def test_pool_random_takes_and_returns_never_share_a_page(seed: int) -> None:
    chooser = random.Random(seed)  # noqa: S311
    pool = PagePool(23, 4)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and chooser.random() < 0.5:
            pool.give_back(held.pop(chooser.randrange(len(held))))
        else:
            count, free = chooser.randrange(6), pool.num_free
            after = chooser.choice(held)[-1:] if held and chooser.random() < 0.5 else []
            pages = pool.take(count, after=after[0] if after else None)
            assert (pages is None) == (count > free)
            if pages is not None:
                assert len(pages) == count
                held.append(pages)
        flat = [page for pages in held for page in pages]
        assert len(set(flat)) == len(flat)
        assert set(flat) <= set(range(23))
        assert (pool.num_used, pool.num_free) == (len(flat), 23 - len(flat))


def test_pool_prefers_the_page_that_follows() -> None:
    pool = PagePool(8, 16)
    assert pool.take(2, after=None) == [0, 1]
    assert pool.take(1, after=None) == [2]
    assert pool.take(1, after=4) == [5]
    assert pool.take(3, after=1) == [3, 4, 6]


def test_pool_refuses_to_free_twice() -> None:
    pool = PagePool(4, 16)
    pool.take(2, after=None)
    pool.give_back([0])
    with pytest.raises(ValueError, match="page 0 is free already"):
        pool.give_back([0])


def test_pool_takes_all_or_nothing() -> None:
    pool = PagePool(3, 16)
    assert pool.take(4, after=None) is None
    assert pool.num_free == 3
    assert pool.take(0, after=None) == []


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert PagePool(1, 16).pages_for(tokens) == pages


def test_pool_bookkeeping_does_not_grow_with_use() -> None:
    pool = PagePool(100, 16)
    for _ in range(200):
        pages = pool.take(90, after=None)
        assert pages is not None
        pool.give_back(pages)
    assert len(pool._lowest) <= 200
