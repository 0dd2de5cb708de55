"""Slabs: every row once, no chunk cut, and each slab the microbatch it would be alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.diffusion.sides import random_batch
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.head.slabs import make_slabs, restrict, rows_within, single_rows
from tide_megatron.losses.rows import rows_of


def rows(seed, sides=2):
    """Return the rows of a microbatch that two teachers cut into chunks, each in its own way."""
    noised = Noiser(seed=seed).at(
        random_batch(seed, sides=sides, samples=4, length=30, teacher_length=33), 0.8
    )
    return rows_of(noised)


def chunks(link):
    """List (student rows, teacher rows) of each chunk."""
    (mine, my_chunk), (theirs, their_chunk) = link.student_rows, link.teacher_rows
    return [
        (mine[my_chunk == number].tolist(), theirs[their_chunk == number].tolist())
        for number in range(link.num_chunks)
    ]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 200), most=st.integers(1, 60), chunked=st.sampled_from([(), ("t0",), ("t0", "t1")])
)
def test_slabs_are_the_microbatch_in_pieces(seed, most, chunked):
    whole = rows(seed)
    slabs = make_slabs(whole, chunked, most)
    assert [slab.start for slab in slabs[1:]] == [slab.stop for slab in slabs[:-1]]
    assert (slabs[0].start, slabs[-1].stop) == (0, len(whole.gold)) if slabs else not len(whole.gold)
    for name in ("t0", "t1"):
        found, pairs = [], []
        for slab in slabs:
            link, chosen = slab.rows.links[name], slab.theirs[name]
            assert torch.equal(link.gold, whole.links[name].gold[chosen])
            assert len(slab.rows.gold) == slab.stop - slab.start
            moved = [
                ([row + slab.start for row in mine], chosen[theirs].tolist()) for mine, theirs in chunks(link)
            ]
            found += moved
            pairs += [
                (mine + slab.start, int(chosen[theirs]))
                for mine, theirs in zip(*(part.tolist() for part in link.pairs), strict=True)
            ]
        wanted = whole.links[name]
        if name in chunked or len(slabs) < 2:
            assert found == chunks(wanted), "a chunk was cut, lost or moved"
        assert sorted(pairs) == sorted(zip(*(part.tolist() for part in wanted.pairs), strict=True))
    for slab in slabs:
        assert slab.is_long == (slab.stop - slab.start > most)
        if slab.is_long:  # one unit: it could not have ended earlier
            inner = restrict(whole, slab.start, slab.stop)
            assert len(make_slabs(inner.rows, chunked, 1)) == 1


def test_a_long_unit_is_cut_anywhere_and_keeps_its_place():
    whole = rows(3)
    slab = restrict(whole, 4, 15, is_long=True)
    parts = single_rows(slab, 4)
    assert [(part.start, part.stop) for part in parts] == [(4, 8), (8, 12), (12, 15)]
    for part in parts:
        assert torch.equal(part.rows.gold, whole.gold[part.start : part.stop])
        for name, chosen in part.theirs.items():
            assert torch.equal(part.rows.links[name].gold, whole.links[name].gold[chosen])


def test_no_rows_make_no_slab():
    whole = rows(1)
    assert make_slabs(restrict(whole, 0, 0).rows, ("t0",), 5) == []


@pytest.mark.parametrize(("budget", "rows_wanted"), [(1000, 9), (190, 0), (200, 1)])
def test_the_budget_says_how_many_rows(budget, rows_wanted):
    if rows_wanted:
        assert rows_within(budget, 100, 100) == rows_wanted
        return
    with pytest.raises(
        ConfigError, match=r"^head\.budget_mib: .* single row here; use at least 1, or more head\.ranks"
    ):
        rows_within(budget, 100, 100)
