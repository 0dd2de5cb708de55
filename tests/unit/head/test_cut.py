"""Id ranges common to all heads: written-out tables, and that they tile every vocabulary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_megatron.head.cut import Cut


def table(vocabularies, ranks):
    cuts = [Cut.of(vocabularies, ranks, rank) for rank in range(ranks)]
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
        Cut.of([100], 2, 0).columns(101)
    with pytest.raises(AssertionError, match="rank 2"):
        Cut.of([100], 2, 2)
