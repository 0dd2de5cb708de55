"""Vocabulary groups: which ranks share the heads, which ids each owns, sizes that do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.parallel.test_layout import lists
from tide_megatron.base.errors import ConfigError
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import VocabGroup, across_replicas, vocab_group_size, vocab_groups


@pytest.mark.parametrize(
    ("layouts", "world", "wanted", "expected"),
    [
        ([], 8, None, 1),
        ([], 8, 4, 4),
        ([Layout(expert=8)], 8, None, 1),
        ([Layout(tensor=2, pipeline=2), Layout()], 8, None, 4),
        ([Layout(tensor=2, pipeline=2), Layout(tensor=2)], 8, 8, 8),
        ([Layout(tensor=4), Layout(pipeline=2)], 16, None, 4),
        ([Layout(tensor=2), Layout(pipeline=3)], 12, None, 6),
        ([Layout(tensor=2), Layout(pipeline=3)], 12, 12, 12),
        ([Layout(tensor=8, pipeline=2), Layout(tensor=4)], 64, None, 16),
        ([Layout(tensor=8, pipeline=2), Layout(tensor=4)], 64, 32, 32),
    ],
)
def test_sizes_by_hand(layouts, world, wanted, expected):
    assert vocab_group_size(layouts, world, wanted) == expected


@pytest.mark.parametrize(
    ("layouts", "world", "wanted", "nearest"),
    [
        ([Layout(tensor=2, pipeline=2)], 8, 2, 4),
        ([Layout(tensor=2, pipeline=2)], 8, 6, 8),
        ([Layout()], 8, 3, 4),
        ([Layout()], 8, 0, 1),
        ([Layout()], 8, 64, 8),
        ([Layout(tensor=2), Layout(pipeline=3)], 12, 4, 6),
    ],
)
def test_sizes_that_do_not_fit(layouts, world, wanted, nearest):
    with pytest.raises(ConfigError, match=f"head.ranks: {wanted} .* {world} ranks.* size is {nearest}$"):
        vocab_group_size(layouts, world, wanted)


def test_groups_are_aligned_blocks():
    assert vocab_groups(8, 4) == lists("0-3, 4-7")
    assert vocab_groups(16, 8) == lists("0-7, 8-15")
    assert vocab_groups(64, 32) == lists("0-31, 32-63")


@pytest.mark.parametrize(
    ("layout", "world", "size", "table"),
    [
        (Layout(), 8, 4, "0-3, 4-7"),
        (Layout(tensor=2), 8, 4, "0 2, 1 3, 4 6, 5 7"),
        (Layout(tensor=2, pipeline=2), 8, 4, "0, 1, 2, 3, 4, 5, 6, 7"),
        (Layout(tensor=2, pipeline=2), 8, 8, "0 4, 1 5, 2 6, 3 7"),
        (Layout(pipeline=2, expert=4), 16, 8, "0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15"),
        (Layout(tensor=4), 16, 8, "0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15"),
        (
            Layout(tensor=4, pipeline=2),
            64,
            32,
            "0 8 16 24, 1 9 17 25, 2 10 18 26, 3 11 19 27, 4 12 20 28, 5 13 21 29, 6 14 22 30, 7 15 23 31,"
            "32 40 48 56, 33 41 49 57, 34 42 50 58, 35 43 51 59, 36 44 52 60, 37 45 53 61, 38 46 54 62,"
            "39 47 55 63",
        ),
    ],
)
def test_same_places_by_hand(layout, world, size, table):
    assert across_replicas(layout, world, size) == lists(table)


def table(vocabularies, ranks):
    cuts = [VocabGroup.of(vocabularies, ranks, rank) for rank in range(ranks)]
    return [[cut.columns(size) for cut in cuts] for size in vocabularies]


def test_ranges_by_hand():
    """The widest head sets the ranges; the others own what they have of them."""
    assert table([211, 190, 320], 4) == [
        [(0, 80), (80, 160), (160, 211), (211, 211)],
        [(0, 80), (80, 160), (160, 190), (190, 190)],
        [(0, 80), (80, 160), (160, 240), (240, 320)],
    ]
    assert table([151936, 157184], 8)[0][7] == (137536, 151936)
    assert table([5], 1) == [[(0, 5)]]
    assert table([5], 4) == [[(0, 2), (2, 4), (4, 5), (5, 5)]]


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4), ranks=st.integers(1, 9))
def test_every_id_has_one_owner_and_it_is_the_same_in_all_heads(sizes, ranks):
    for size, ranges in zip(sizes, table(sizes, ranks), strict=True):
        assert [number for start, stop in ranges for number in range(start, stop)] == list(range(size))
        widest = table([max(sizes)], ranks)[0]
        assert all(
            (start >= low and stop <= high) or start == stop
            for (start, stop), (low, high) in zip(ranges, widest, strict=True)
        )


def test_a_head_that_was_not_counted_is_refused():
    with pytest.raises(AssertionError, match="was not cut"):
        VocabGroup.of([100], 2, 0).columns(101)
