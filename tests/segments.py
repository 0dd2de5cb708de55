"""Segments of rows that hold one sample each, as masks read them."""

from tide_megatron.diffusion.segments import Segments


def numbers_of(lengths, length):
    """Return [rows, length] numbers of segments from [rows] real lengths; None for None."""
    return None if lengths is None else Segments.of_rows(lengths).numbers(len(lengths), length)
