"""A flat range of an array, cut into chunks, is that range: every element once, in order."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_megatron.checkpoint.planner import chunks_of

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@given(SHAPES, st.data())
def test_chunks_hold_the_range_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    found = []
    for offsets, sizes in chunks_of(shape, start, stop):
        assert all(sizes)
        found += numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].ravel().tolist()
    assert found == list(range(start, stop))


@pytest.mark.parametrize(
    ("start", "stop", "wanted"),
    [
        (0, 12, [((0, 0), (3, 4))]),
        (5, 7, [((1, 1), (1, 2))]),
        (2, 5, [((0, 2), (1, 2)), ((1, 0), (1, 1))]),
        (3, 9, [((0, 3), (1, 1)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]),
    ],
)
def test_a_range_of_a_matrix_is_at_most_three_chunks(start, stop, wanted):
    assert list(chunks_of((3, 4), start, stop)) == wanted
