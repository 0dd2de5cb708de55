"""Masks: the predicate against the rule in words, for every pair of positions; padding on top of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.segments import numbers_of
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context, dense_mask, may_attend


def by_words(kind: str, block: int, length: int, query: int, key: int) -> bool:
    """Say the rule of spec section 1 item 5 in plain Python, with its three reasons apart."""
    if kind == "bidirectional":
        return True
    query_block, key_block = (query % length) // block, (key % length) // block
    if kind == "block_causal":
        return key_block <= query_block
    query_is_noised, key_is_noised = query < length, key < length
    if query_is_noised:
        return query_block == key_block if key_is_noised else key_block < query_block
    return not key_is_noised and key_block <= query_block


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["bidirectional", "block_causal", "block_diffusion"]),
    block=st.integers(1, 7),
    length=st.integers(1, 12),
)
def test_every_pair_follows_the_rule(kind, block, length):
    context = Context(kind=kind, block_size=block)
    total = context.parts * length
    rendered = dense_mask(context, length)
    assert rendered.shape == (1, 1, total, total)
    words = [[by_words(kind, block, length, query, key) for key in range(total)] for query in range(total)]
    assert rendered[0, 0].tolist() == words


def test_hand_written_mask_of_two_blocks():
    """Two blocks of two tokens, [x_t ; x_0]: written out by hand."""
    rows = ["11000000", "11000000", "00111100", "00111100", "00001100", "00001100", "00001111", "00001111"]
    mask = dense_mask(Context(kind="block_diffusion", block_size=2), 4)[0, 0]
    assert ["".join(str(int(x)) for x in row) for row in mask] == rows


def test_noised_tokens_never_see_their_own_clean_block():
    length, block = 12, 4
    mask = dense_mask(Context(kind="block_diffusion", block_size=block), length)[0, 0]
    for query in range(length):
        own = range(length + query // block * block, length + (query // block + 1) * block)
        assert not mask[query, list(own)].any()


def test_predicate_broadcasts_and_returns_bool():
    query, key = torch.arange(6)[:, None, None], torch.arange(4)[None, :, None]
    for kind in ("bidirectional", "block_causal", "block_diffusion"):
        seen = may_attend(Context(kind=kind, block_size=2), 3, query, key)
        assert seen.shape == (6, 4, 1)
        assert seen.dtype == torch.bool


@pytest.mark.parametrize("kind", ["bidirectional", "block_causal", "block_diffusion"])
def test_padding_is_seen_by_nobody_and_sees_itself(kind):
    context, length, lengths = Context(kind=kind, block_size=2), 5, torch.tensor([5, 3, 0])
    mask = dense_mask(context, length, numbers_of(lengths, length))
    total = context.parts * length
    assert mask.shape == (3, 1, total, total)
    plain = dense_mask(context, length)[0, 0]
    for sample, real in enumerate(lengths.tolist()):
        for query in range(total):
            for key in range(total):
                if query % length < real:
                    expected = bool(plain[query, key]) and key % length < real
                else:
                    expected = query == key
                assert mask[sample, 0, query, key] == expected
    assert mask.any(dim=-1).all()  # no softmax is empty


def test_attention_of_real_tokens_does_not_depend_on_padding():
    """Numbers, not only bools: outputs at real positions equal those of the unpadded sequence.

    The last real block is cut by the padding, so that only the padding rule keeps the two apart.
    """
    context = Context(kind="block_diffusion", block_size=3)
    torch.manual_seed(0)
    inputs = torch.randn(3, 1, 1, 16, 4)
    real = [*range(5), *range(8, 13)]
    padded = torch.nn.functional.scaled_dot_product_attention(
        *inputs, dense_mask(context, 8, numbers_of(torch.tensor([5]), 8))
    )
    short = torch.nn.functional.scaled_dot_product_attention(*inputs[:, :, :, real], dense_mask(context, 5))
    torch.testing.assert_close(padded[:, :, real], short)
    assert padded.isfinite().all()


def test_unknown_kind_and_empty_block_are_refused():
    with pytest.raises(ConfigError, match="block_diffusion"):
        Context(kind="block_difusion")
    with pytest.raises(ConfigError, match="block_size: 0"):
        Context(kind="block_causal", block_size=0)


def test_blocks_are_the_papers_unless_said_otherwise():
    assert Context(kind="block_diffusion").block_size == 32


def test_number_of_parts():
    kinds = {"bidirectional": 1, "block_causal": 1, "block_diffusion": 2}
    assert {kind: Context(kind=kind).parts for kind in kinds} == kinds
