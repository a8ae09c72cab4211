from __future__ import annotations

from typing import Any

import pytest

from protos.errors import InvalidArgument
from shardworker.tables import HeldPosition, PageTables


@pytest.fixture
def tables() -> PageTables:
    return PageTables(num_pages=8, page_tokens=4)


def do(tables: PageTables, batch: Any) -> list[list[int]]:
    """A step from its beginning to its commitment."""
    tables.check(batch)
    pages = [list(table.pages) for table in tables.begin(batch)]
    tables.commit(batch.sequences)
    return pages


def test_pages_grow_with_the_tokens(tables: PageTables, make_batch: Any) -> None:
    assert do(tables, make_batch((1, 0, 3, [5]), (2, 0, 5, [0, 1]))) == [[5], [0, 1]]
    assert do(tables, make_batch((1, 3, 1, []), (2, 5, 3, []))) == [[5], [0, 1]]
    assert do(tables, make_batch((1, 4, 5, [6, 2]))) == [[5, 6, 2]]


def test_contiguity_is_known(tables: PageTables, make_batch: Any) -> None:
    (table,) = tables.begin(make_batch((1, 0, 8, [3, 4])))
    assert table.contiguous
    tables.commit(make_batch((1, 0, 8, [])).sequences)
    tables.begin(make_batch((1, 8, 1, [6])))
    assert not table.contiguous
    tables.begin(make_batch((1, 8, 1, [5])))
    assert table.contiguous


def test_a_position_beyond_what_is_held_is_refused(tables: PageTables, make_batch: Any) -> None:
    do(tables, make_batch((1, 0, 3, [5])))
    with pytest.raises(HeldPosition, match="wanted position 4, the worker stands at 3: begin it anew at 0") as raised:
        tables.check(make_batch((1, 4, 1, [6])))
    assert (raised.value.sequence, raised.value.position) == (1, 3)


def test_what_is_beyond_the_position_is_cut_off(tables: PageTables, make_batch: Any) -> None:
    do(tables, make_batch((1, 0, 12, [0, 1, 2])))
    # Pages 1 and 2 are free again, also for another sequence of the same batch.
    assert do(tables, make_batch((1, 3, 1, []), (2, 0, 8, [2, 1]))) == [[0], [2, 1]]
    with pytest.raises(HeldPosition):
        tables.check(make_batch((1, 12, 1, [3])))


def test_an_uncommitted_step_holds_its_position_only(tables: PageTables, make_batch: Any) -> None:
    do(tables, make_batch((1, 0, 4, [0])))
    tables.begin(make_batch((1, 4, 4, [1])))
    with pytest.raises(HeldPosition):
        tables.check(make_batch((1, 8, 1, [2])))
    assert do(tables, make_batch((1, 4, 5, [3, 4]))) == [[0, 3, 4]]


def test_released_sequences_give_their_pages_up_at_once(tables: PageTables, make_batch: Any) -> None:
    do(tables, make_batch((1, 0, 8, [0, 1])))
    assert do(tables, make_batch((2, 0, 8, [1, 0]), released=(1, 77))) == [[1, 0]]
    with pytest.raises(HeldPosition):
        tables.check(make_batch((1, 8, 1, [3])))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "at least one sequence"),
        ([(0, 0, 1, [0])], "number >= 1"),
        ([(2, 0, 0, [])], "with rows"),
        ([(2, 0, 1, [0]), (2, 0, 1, [2])], "stands once"),
        ([(2, 0, 1, [8])], "page 8 of 8"),
        ([(2, 0, 1, [7])], "page 7 is in use by sequence 1"),
        ([(2, 0, 8, [3, 3])], "page 3 is in use by another place of this batch"),
        ([(2, 0, 4, [3]), (3, 0, 4, [3])], "page 3 is in use by another place of this batch"),
        ([(2, 0, 5, [3])], "pages for positions below 5: wanted 2, found 0 held and 1 new"),
        ([(2, 0, 4, [3, 4])], "pages for positions below 4: wanted 1, found 0 held and 2 new"),
        ([(1, 4, 1, [])], "positions below 5: wanted 2, found 1 held and 0 new"),
    ],
)
def test_a_bad_batch_is_refused_and_changes_nothing(tables: PageTables, make_batch: Any, rows: Any, text: str) -> None:
    do(tables, make_batch((1, 0, 4, [7])))
    with pytest.raises(InvalidArgument, match=text):
        tables.check(make_batch(*rows))
    assert do(tables, make_batch((1, 4, 4, [6]))) == [[7, 6]]
