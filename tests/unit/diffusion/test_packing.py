"""Packing: samples behind each other in a row, where they stand, and who sees whom there."""

import random

import pytest
import torch

from tests.unit.diffusion.test_mask import by_words
from tide_megatron.diffusion.mask import Context, TwoViews, dense_mask
from tide_megatron.diffusion.packing import Packs, packed
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import view_of_parts

CONTEXTS = [
    Context(kind="bidirectional"),
    *(Context(kind=kind, block_size=3) for kind in ("block_causal", "block_diffusion")),
    TwoViews(kind="block_diffusion", block_size=3),
]


def view_of(context, tokens, length):
    """Return a view in which an id tells its sample, part and position; all real noised tokens are asked."""
    parts = context.parts
    place = torch.arange(parts * length)
    ids = torch.arange(len(tokens))[:, None] * 1000 + place // length * 100 + place % length + 1
    real = place % length < torch.tensor(tokens)[:, None]
    asked = real & (place // length < context.noised_parts)
    if context.noised_parts == 2:  # in (sample, position) order, each in one of the two
        sample, position = real[:, :length].nonzero(as_tuple=True)
        rows = (sample * parts + position % 2) * length + position
    else:
        rows = asked.flatten().nonzero().flatten()
    return view_of_parts(ids, context, Segments.of_rows(torch.tensor(tokens)), rows)


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_found_again_in_a_pack(context, seed):
    draw = random.Random(seed)
    tokens = [2, 3] + [draw.choice((0, 1, 2, 3, 5, 8, 11)) for _ in range(draw.randint(2, 9))]
    length = draw.choice((11, 14, 30))
    view = view_of(context, tokens, 12)
    found = packed(view, tokens, length)
    assert len(found.ids) < len(view.ids)
    assert found.length <= length
    assert torch.equal(found.ids.flatten()[found.rows], view.ids.flatten()[view.rows])
    assert len(found.segments.pack) == sum(map(bool, tokens))
    numbers = found.numbers()
    block = 1 if context.kind == "bidirectional" else context.block_size
    given = [sample for sample, own in enumerate(tokens) if own]
    for number, sample in enumerate(given):
        pack, start = int(found.segments.pack[number]), int(found.segments.start[number])
        assert start % block == 0
        own = slice(start, start + tokens[sample])
        assert (numbers[pack] == number).nonzero().flatten().tolist() == list(range(own.start, own.stop))
        for part in range(context.parts):
            first = part * found.length
            here = slice(first + own.start, first + own.stop)
            there = slice(part * 12, part * 12 + tokens[sample])
            assert torch.equal(found.ids[pack, here], view.ids[sample, there])
            assert found.positions[pack, here].tolist() == list(range(tokens[sample]))
    real = (numbers >= 0).repeat(1, context.parts)
    assert int(real.sum()) == context.parts * sum(tokens)
    assert (found.ids[~real] == 0).all(), "pads are ids that every model knows"
    assert torch.equal(found.rows[found.order().argsort()], found.rows), "the order is that of samples"
    assert torch.equal(
        found.rows % (context.parts * found.length) < context.noised_parts * found.length,
        torch.ones_like(found.rows, dtype=torch.bool),
    )


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("longer", [0, 4])
def test_a_token_sees_its_own_segment_as_if_it_stood_alone(context, longer):
    view = packed(view_of(context, [4, 7, 2, 5, 1], 7), [4, 7, 2, 5, 1], 13)
    view = view.padded(len(view.ids) + bool(longer), view.length + longer)
    numbers, length = view.numbers(), view.length
    mask = dense_mask(context, length, numbers)[:, 0]
    assert len(numbers) < 4
    for pack, row in enumerate(numbers.tolist()):
        for query in range(context.parts * length):
            for key in range(context.parts * length):
                own, other = row[query % length], row[key % length]
                if own < 0:
                    expected = query == key
                else:
                    alone = _alone(context, row, own, query, length), _alone(context, row, own, key, length)
                    expected = own == other and _allowed(context, row.count(own), *alone)
                assert mask[pack, query, key] == expected


def _alone(context, row, number, place, length):
    """Return where a place of a pack stands in its segment's own sequence of parts."""
    return place // length * row.count(number) + place % length - row.index(number)


def _allowed(context, length, query, key):
    """Say the rule in words; of two noised parts, neither sees the other, and both the clean one."""
    if context.noised_parts == 1:
        return by_words(context.kind, context.block_size, length, query, key)
    parts = query // length, key // length
    if parts[0] < 2 and parts[1] < 2 and parts[0] != parts[1]:
        return False
    query, key = ((part >= 2) * length + at % length for part, at in zip(parts, (query, key), strict=True))
    return by_words(context.kind, context.block_size, length, query, key)


def test_rows_are_filled_first_fit():
    view = view_of(CONTEXTS[0], [3, 8, 5, 2, 6], 8)
    found = packed(view, [3, 8, 5, 2, 6], 8)
    assert found.segments.pack.tolist() == [2, 0, 2, 1, 1]
    assert found.segments.start.tolist() == [5, 0, 0, 6, 0]
    assert packed(view, [3, 8, 5, 2, 6], 8).ids.equal(found.ids)


def test_rows_are_no_longer_than_what_they_hold():
    assert packed(view_of(CONTEXTS[0], [3, 4, 5], 8), [3, 4, 5], 100).ids.shape == (1, 12)
    assert (
        packed(view_of(CONTEXTS[2], [3, 4, 5], 8), [3, 4, 5], 100).length == 15
    )  # 6 + 3 + 6 in whole blocks


def test_what_came_first_fit_takes_no_more_rows_than_it_did():
    """Longest first takes three rows of ten here: 4 4, 3 3 3 and 3; as they come it takes two."""
    tokens = [4, 3, 3, 4, 3, 3]
    packs = Packs(10, 1)
    assert [packs.place(own) for own in tokens] == [(0, 0), (0, 4), (0, 7), (1, 0), (1, 4), (1, 7)]
    assert len(packed(view_of(CONTEXTS[0], tokens, 4), tokens, 10).ids) == 2


def test_what_has_no_room_for_two_stays_as_it_is():
    for tokens in ([5, 6, 7], [0, 0]):
        view = view_of(CONTEXTS[1], tokens, 7)
        assert packed(view, tokens, 7) is view
