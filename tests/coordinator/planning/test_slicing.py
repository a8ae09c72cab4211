from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.slicing import GROUP, Span, cut, cut_columns, cut_heads, cut_vocabulary
from protos.errors import TopologyError
from protos.tensors import BLOCK

SHARDS = st.integers(1, 64)


def sizes(spans: tuple[Span, ...]) -> list[int]:
    return [end - start for start, end in spans]


def check_cover(spans: tuple[Span, ...], size: int) -> None:
    """Every index is in one part, in order, and no part is empty."""
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert min(sizes(spans)) > 0


def test_group_is_the_block_of_the_codec() -> None:
    assert GROUP == BLOCK


@given(num_shards=SHARDS, extra=st.integers(0, 100_000))
def test_cut_is_even(num_shards: int, extra: int) -> None:
    spans = cut(num_shards + extra, num_shards)
    check_cover(spans, num_shards + extra)
    assert len(spans) == num_shards
    assert max(sizes(spans)) - min(sizes(spans)) <= 1


@given(num_shards=SHARDS, groups=st.integers(0, 700), rest=st.integers(1, GROUP))
def test_columns_are_cut_at_groups(num_shards: int, groups: int, rest: int) -> None:
    width = (num_shards - 1 + groups) * GROUP + rest
    spans = cut_columns(width, num_shards, "a block")
    check_cover(spans, width)
    assert len(spans) == num_shards
    assert all(start % GROUP == 0 for start, _ in spans)
    in_groups = [-(-size // GROUP) for size in sizes(spans)]
    assert max(in_groups) - min(in_groups) <= 1


@given(num_kv_heads=st.integers(1, 32), group=st.integers(1, 16), data=st.data())
def test_heads_are_covered_with_the_kv_heads_that_they_read(num_kv_heads: int, group: int, data: st.DataObject) -> None:
    num_heads = num_kv_heads * group
    num_shards = data.draw(st.integers(1, num_heads))
    parts = cut_heads(num_heads, num_kv_heads, num_shards)
    assert len(parts) == num_shards
    check_cover(tuple(part.heads for part in parts), num_heads)
    for part in parts:
        read = {head * num_kv_heads // num_heads for head in range(*part.heads)}
        assert read == set(range(*part.kv_heads))
    most_kv = max(sizes(tuple(part.kv_heads for part in parts)))
    assert most_kv == -(-num_kv_heads // num_shards)
    if num_shards >= num_kv_heads:
        # No shard has more than its group's heads.
        assert max(sizes(tuple(part.heads for part in parts))) <= group


@given(power=st.integers(0, 5), kv_power=st.integers(0, 5), group=st.integers(1, 16))
def test_heads_that_divide_are_cut_evenly(power: int, kv_power: int, group: int) -> None:
    num_kv_heads, num_shards = 2**kv_power, 2**power
    num_heads = num_kv_heads * group * max(1, num_shards // num_kv_heads)
    parts = cut_heads(num_heads, num_kv_heads, num_shards)
    assert {size for part in parts for size in sizes((part.heads,))} == {num_heads // num_shards}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards", "found"),
    [
        (9, 3, 1, [((0, 9), (0, 3))]),
        (9, 3, 2, [((0, 4), (0, 2)), ((4, 9), (1, 3))]),
        (9, 3, 3, [((0, 3), (0, 1)), ((3, 6), (1, 2)), ((6, 9), (2, 3))]),
        (9, 3, 4, [((0, 3), (0, 1)), ((3, 6), (1, 2)), ((6, 7), (2, 3)), ((7, 9), (2, 3))]),
        (96, 8, 3, [((0, 24), (0, 2)), ((24, 60), (2, 5)), ((60, 96), (5, 8))]),
        (32, 4, 8, [((4 * i, 4 * i + 4), (i // 2, i // 2 + 1)) for i in range(8)]),
    ],
)
def test_heads_of_real_models(heads: int, kv_heads: int, shards: int, found: list[tuple[Span, Span]]) -> None:
    assert [(part.heads, part.kv_heads) for part in cut_heads(heads, kv_heads, shards)] == found


@pytest.mark.parametrize(
    ("width", "shards", "found"),
    [
        (1408, 8, [160, 192, 160, 192, 160, 192, 160, 192]),
        (10944, 8, [1344, 1376, 1376, 1376, 1344, 1376, 1376, 1376]),
        (10944, 4, [2720, 2752, 2720, 2752]),
        (768, 8, [96] * 8),
        (352, 3, [96, 128, 128]),
        (304, 3, [96, 96, 112]),
    ],
)
def test_columns_of_real_models(width: int, shards: int, found: list[int]) -> None:
    assert sizes(cut_columns(width, shards, "an expert")) == found


@pytest.mark.parametrize("num_shards", [0, -1])
def test_no_shards_are_refused(num_shards: int) -> None:
    for attempt in (
        lambda: cut_heads(8, 8, num_shards),
        lambda: cut_columns(64, num_shards, "x"),
        lambda: cut_vocabulary(9, num_shards),
    ):
        with pytest.raises(TopologyError, match=f"a mesh needs at least 1 shard, found {num_shards}"):
            attempt()


def test_too_many_shards_are_refused_with_the_way_out() -> None:
    with pytest.raises(
        TopologyError, match=r"^attention with 9 heads cannot be cut into 16 shards, at most into 9: use fewer shards$"
    ):
        cut_heads(9, 3, 16)
    with pytest.raises(
        TopologyError, match=r"^an expert of 100 columns, in groups of 32 cannot be cut into 5 shards, at most into 4"
    ):
        cut_columns(100, 5, "an expert")
    with pytest.raises(TopologyError, match=r"^a vocabulary of 3 rows cannot be cut into 4 shards, at most into 3"):
        cut_vocabulary(3, 4)
