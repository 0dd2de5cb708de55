"""Updates cut by a budget of positions: the same samples, few lengths, equally many microbatches a shard."""

import itertools

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_megatron.base.errors import ConfigError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.dealing import RUNGS, Rungs, by_length, cut_by_budget
from tide_megatron.data.loader import Loader
from tide_megatron.parallel.layout import DataShard


@pytest.mark.parametrize(
    ("longest", "block", "wanted"),
    [
        (100, 1, (16, 32, 48, 64, 80, 96, 112)),
        (128, 16, (16, 32, 48, 64, 80, 96, 112, 128)),
        (480, 16, (48, 64, 96, 128, 176, 240, 352, 480)),
        (1024, 32, (128, 256, 384, 512, 640, 768, 896, 1024)),
        (4096, 32, (384, 512, 768, 1024, 1536, 2048, 2944, 4096)),
        (1100, 48, (384, 768, 1152)),
        (5, 1, (16,)),
    ],
)
def test_lengths_are_few_multiples_up_to_the_longest(longest, block, wanted):
    assert Rungs.of(longest, block).lengths == wanted


@given(st.integers(1, 40_000), st.sampled_from([1, 8, 32, 100]))
def test_any_length_has_a_rung(longest, block):
    rungs = Rungs.of(longest, block).lengths
    assert len(rungs) <= RUNGS
    assert all(rung % block == 0 and rung % (128 if longest >= 1024 else 16) == 0 for rung in rungs)
    lengths = numpy.array([1, longest // 3 + 1, longest])
    above = Rungs(lengths=rungs).above(lengths)
    assert (above >= lengths).all()
    assert set(above.tolist()) <= set(rungs)


def test_a_fixed_length_is_the_only_one():
    assert Rungs.of(100, 16, 512).lengths == (512,)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_sample_is_read_once_within_the_budget(data):
    shards = data.draw(st.sampled_from([1, 2, 3, 8]))
    samples = shards * data.draw(st.integers(1, 24))
    models = data.draw(st.integers(1, 3))
    lengths = st.lists(st.integers(1, 2000), min_size=models, max_size=models)
    tokens = numpy.array(data.draw(st.lists(lengths, min_size=samples, max_size=samples)))
    rungs = [Rungs.of(2000, 32)] * models
    budget = data.draw(st.sampled_from([2048, 3000, 10_000, 10**6]))
    cut = cut_by_budget(tokens, rungs, budget, shards)
    assert len(cut) == shards
    assert len({len(shard) for shard in cut}) == 1
    every = list(itertools.chain.from_iterable(cut))
    assert sorted(place for dealt in every for place in dealt.places) == list(range(samples))
    for dealt in every:
        assert len(dealt.places) * max(dealt.lengths) <= budget
        for model, (rung, length) in enumerate(zip(rungs, dealt.lengths, strict=True)):
            assert length == rung.above(tokens[list(dealt.places), model]).max()


def test_microbatches_of_one_turn_have_like_work():
    tokens = numpy.random.default_rng(3).lognormal(6, 0.8, (512, 1)).clip(1, 4096).astype(numpy.int64)
    cut = cut_by_budget(tokens, [Rungs.of(4096, 32)], 8192, 8)
    turns = [[len(dealt.places) * dealt.lengths[0] for dealt in turn] for turn in zip(*cut, strict=True)]
    waiting = sum(max(turn) * len(turn) - sum(turn) for turn in turns) / sum(map(sum, turns))
    assert waiting < 0.06
    filled = tokens.sum() / sum(map(sum, turns))
    assert filled > 0.75
    assert by_length(tokens)[0] == tokens[:, 0].argmax()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_budget_reads_the_same_update(prepared, world):
    columns = PreparedData(prepared)
    wanted = Loader(columns=columns, samples=12, seed=3).microbatch(12, 0)
    found, shapes = [], set()
    for rank in range(world):
        shard = DataShard(rank=rank, size=world)
        loader = Loader(
            columns=columns, samples=12 // world, shard=shard, deal="length", tokens=300, block_size=8, seed=3
        )
        for batch in loader.update(12):
            found += zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
            assert batch.ids.numel() <= 300
            shapes.add(batch.ids.shape[1])
    assert sorted(found) == sorted(zip(wanted.sample_ids.tolist(), wanted.epochs.tolist(), strict=True))
    assert shapes <= set(Rungs.of(loader.longest, 8).lengths)


def test_budgets_that_cannot_be_are_refused(prepared):
    columns = PreparedData(prepared)
    with pytest.raises(ConfigError, match=r"^tokens: 10 positions have no room for the longest sample of"):
        Loader(columns=columns, samples=4, deal="length", tokens=10)
    with pytest.raises(ConfigError, match=r"^tokens: a budget of positions needs samples dealt by length"):
        Loader(columns=columns, samples=4, tokens=1000)
