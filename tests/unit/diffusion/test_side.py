"""Chunks of a side: their members, and hiding them whole."""

import pytest
import torch

from tests.unit.diffusion.sides import chunks_of, random_batch
from tide_megatron.diffusion.alignment import mask_whole_chunks
from tide_megatron.diffusion.noise import Noiser


@pytest.mark.parametrize("seed", range(5))
def test_members_are_the_tokens_of_each_chunk(seed):
    side = random_batch(seed).sides["t0"]
    for (chunk, sample, position), column in ((side.students(), 1), (side.teachers(), 2)):
        found = list(zip(chunk.tolist(), sample.tolist(), position.tolist(), strict=True))
        wanted = [
            (number, entry[0], place)
            for number, entry in enumerate(chunks_of(side))
            for place in entry[column]
        ]
        assert found == wanted


def closed_by_hand(hidden, maskable, sides):
    """Hide whatever shares a chunk with a masked token, until nothing changes."""
    wider = hidden.clone()
    while True:
        before = wider.clone()
        for side in sides:
            for sample, students, _ in chunks_of(side):
                if wider[sample, students].any():
                    wider[sample, students] |= maskable[sample, students]
        if torch.equal(before, wider):
            return wider


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_whole_hiding_closes_over_all_sides_and_spares_the_prompt(seed, sides):
    batch = random_batch(seed, sides=sides)
    drawn = Noiser(seed=seed).at(batch, 0.2).masked
    found = mask_whole_chunks(drawn, batch.maskable, list(batch.sides.values()))
    assert torch.equal(found, closed_by_hand(drawn, batch.maskable, batch.sides.values()))
    assert (drawn & ~found).sum() == 0
    assert (found & ~batch.maskable).sum() == 0


def test_several_sides_need_more_than_one_round():
    """Otherwise the test above could not see a single pass."""
    rounds = 0
    for seed in range(6):
        batch = random_batch(seed, sides=3)
        sides = list(batch.sides.values())
        drawn = Noiser(seed=seed).at(batch, 0.2).masked
        once = drawn
        for side in sides:
            once = mask_whole_chunks(once, batch.maskable, [side])
        rounds += not torch.equal(once, mask_whole_chunks(drawn, batch.maskable, sides))
    assert rounds > 0


def test_the_noiser_hides_whole_chunks_of_the_sides_it_is_told():
    batch = random_batch(1, sides=2)
    drawn = Noiser(seed=4)(batch)
    whole = Noiser(seed=4, whole_chunks_of=("t1",))(batch)
    assert torch.equal(whole.masked, mask_whole_chunks(drawn.masked, batch.maskable, [batch.sides["t1"]]))
    assert torch.equal(whole.time, drawn.time)
    assert whole.masked.sum() > drawn.masked.sum()


def test_a_side_without_chunks_changes_nothing():
    batch = random_batch(1)
    side = batch.sides["t0"]
    empty = type(side)(
        ids=side.ids,
        lengths=side.lengths,
        spans=side.spans[:0],
        sample=side.sample[:0],
        number=side.number[:0],
    )
    hidden = Noiser(seed=4)(batch).masked
    assert torch.equal(mask_whole_chunks(hidden, batch.maskable, [empty]), hidden)
