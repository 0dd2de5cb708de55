"""Padding: end-of-text fills blocks and is learnt, pads fill lengths and are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_megatron.base.errors import DataError
from tide_megatron.diffusion.batch import IGNORED, pad_to_blocks, pad_to_length

EOS, PAD = 7, 8


def test_a_short_block_is_filled_with_targets():
    assert pad_to_blocks([1, 2, 3], [IGNORED, 2, 3], 4, EOS) == ([1, 2, 3, EOS], [IGNORED, 2, 3, EOS])
    assert pad_to_blocks([1] * 5, [1] * 5, 4, EOS) == ([1] * 5 + [EOS] * 3, [1] * 5 + [EOS] * 3)


@given(length=st.integers(0, 40), block=st.integers(1, 9))
def test_every_length_becomes_the_next_multiple(length, block):
    ids, labels = pad_to_blocks([1] * length, [1] * length, block, EOS)
    assert len(ids) == len(labels) == -(-length // block) * block
    assert ids[length:] == labels[length:] == [EOS] * (len(ids) - length)


def test_an_exact_multiple_gets_nothing_and_the_input_stays():
    ids = [1, 2, 3, 4]
    padded, _ = pad_to_blocks(ids, ids, 4, EOS)
    assert padded == ids
    assert padded is not ids


def test_fixed_length_is_padded_without_targets():
    assert pad_to_length([1, 2], [1, 2], 4, PAD) == ([1, 2, PAD, PAD], [1, 2, IGNORED, IGNORED])
    assert pad_to_length([1, 2], [1, 2], 2, PAD) == ([1, 2], [1, 2])


def test_an_over_long_example_is_refused():
    with pytest.raises(DataError, match=r"3 tokens .* fixed length of 2"):
        pad_to_length([1, 2, 3], [1, 2, 3], 2, PAD)


def test_ids_and_labels_that_disagree_are_our_bug():
    with pytest.raises(AssertionError, match="2 ids but 1 labels"):
        pad_to_blocks([1, 2], [1], 4, EOS)
    with pytest.raises(AssertionError, match="2 ids but 1 labels"):
        pad_to_length([1, 2], [1], 4, PAD)
