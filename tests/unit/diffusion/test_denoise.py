"""How many tokens each step of block sampling commits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_megatron.diffusion.denoise import transfer_counts
from tide_megatron.diffusion.schedule import SCHEDULES, Linear


def test_fp32_decides_ties():
    """32 tokens in 7 steps: exact arithmetic would give 4 and 5 in another order (spec section 7 item 2)."""
    assert transfer_counts(Linear(), [32], 7).tolist() == [[5, 4, 5, 4, 5, 4, 5]]


def test_empty_steps_are_dropped_and_rows_padded():
    counts = transfer_counts(Linear(), [5, 2, 0], 8)
    assert counts.sum(dim=1).tolist() == [5, 2, 0]
    assert counts.shape[1] == 5
    assert (counts[0] == 1).all()
    assert counts[1, counts[1].count_nonzero() :].eq(0).all()
    assert transfer_counts(Linear(), [0], 4).shape == (1, 0)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    hidden=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    steps=st.integers(1, 40),
)
def test_every_hidden_token_is_committed_once(name, hidden, steps):
    counts = transfer_counts(SCHEDULES[name], hidden, steps)
    assert counts.sum(dim=1).tolist() == hidden
    assert (counts >= 0).all()
    assert counts.shape[1] <= steps


def test_one_step_commits_everything():
    assert transfer_counts(Linear(), [9, 4], 1).tolist() == [[9], [4]]
    with pytest.raises(AssertionError, match="at least one step, not 0"):
        transfer_counts(Linear(), [9, 4], 0)
