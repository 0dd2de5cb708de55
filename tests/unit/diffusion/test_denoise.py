"""Block sampling arithmetic: counts, commits, and plans that are the predicate seen row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_megatron.diffusion.denoise import commit_most_confident, key_value_plan, transfer_counts
from tide_megatron.diffusion.mask import Context, dense_mask
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


def test_the_most_confident_hidden_positions_are_committed():
    logits = torch.zeros(1, 4, 3)
    logits[0, :, 2] = torch.tensor([1.0, 4.0, 9.0, 3.0])
    ids, hidden = torch.tensor([[9, 9, 5, 9]]), torch.tensor([[True, True, False, True]])
    new_ids, new_hidden = commit_most_confident(logits, ids, hidden, torch.tensor([2]))
    assert new_ids.tolist() == [[9, 2, 5, 2]]  # the visible one is surer still and stays
    assert new_hidden.tolist() == [[True, False, False, False]]
    assert ids.tolist() == [[9, 9, 5, 9]]


def test_confidence_is_a_probability_not_a_logit():
    """A large logit among large ones is less sure than a small one among small ones."""
    logits = torch.tensor([[[10.0, 9.9, 9.8], [2.0, -2.0, -2.0]]])
    _, hidden = commit_most_confident(
        logits, torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.tensor([1])
    )
    assert hidden.tolist() == [[True, False]]


def test_rows_commit_their_own_number_and_never_more_than_is_hidden():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    ids = torch.full((3, 5), 7)
    new_ids, left = commit_most_confident(logits, ids, hidden, torch.tensor([2, 4, 3]))
    assert left.sum(dim=1).tolist() == [3, 0, 0]
    assert (new_ids[~hidden] == 7).all()
    assert torch.equal(new_ids[hidden & ~left], logits.argmax(-1)[hidden & ~left])


@pytest.mark.parametrize("length", [12, 10, 9])  # the last block: whole, half, a single token
@pytest.mark.parametrize("block", [0, 1, 2])
def test_plan_is_the_training_mask_of_a_block(length, block):
    """Cached plus own positions are what a block's queries see in [x_t ; x_0], noised and clean."""
    context = Context(kind="block_diffusion", block_size=4)
    plan = key_value_plan(context, length, block)
    mask = dense_mask(context, length)[0, 0]
    noised, clean = mask[plan.queries], mask[plan.queries + length]
    assert plan.queries.tolist() == list(range(block * 4, min(block * 4 + 4, length)))
    for query in noised:
        assert query[:length].nonzero()[:, 0].tolist() == plan.queries.tolist()
        assert query[length:].nonzero()[:, 0].tolist() == plan.cached.tolist()
    for query in clean:
        seen = query.nonzero()[:, 0] - length
        assert seen.tolist() == [*plan.cached.tolist(), *plan.queries.tolist()]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_plan_of_a_block_causal_model(block):
    context = Context(kind="block_causal", block_size=4)
    plan = key_value_plan(context, 10, block)
    for query in dense_mask(context, 10)[0, 0][plan.queries]:
        assert query.nonzero()[:, 0].tolist() == [*plan.cached.tolist(), *plan.queries.tolist()]


def test_a_bidirectional_model_caches_nothing():
    plan = key_value_plan(Context(kind="bidirectional", block_size=4), 6, 0)
    assert plan.queries.tolist() == list(range(6))
    assert plan.cached.numel() == 0
