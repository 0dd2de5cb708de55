"""Flat ranges as boxes: how the part of a parameter that one rank owns is written without gathering.

A distributed optimizer cuts the flat buffer of all parameters evenly over ranks, wherever the cuts fall. A
checkpoint format knows only boxes (offsets and sizes along each axis). A range of a matrix is at most three:
the end of a row, whole rows, the start of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one number an axis."""


def boxes_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements start..stop of a row-major array into boxes, in order.

    Args:
        shape: of the array.
        start: first element, counted flat.
        stop: one behind the last element.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows first..last
    if first > last:  # all within one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within(shape, last, 0, stop - last * row)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    """Cut a range inside one row."""
    for offsets, sizes in boxes_of(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)
