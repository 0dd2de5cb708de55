"""Held-out scores: whoever scores which samples, every sample counts once; and what options may be."""

import numpy
import pydantic
import pytest
import torch

from tests.small_tokenizer import write_chats, write_tokenizer
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate import likelihood
from tide_megatron.evaluate.likelihood import evaluate, scored_samples
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.head.tiles import RowScores
from tide_megatron.parallel.layout import DataShard, Layout
from tide_megatron.text.tokenizer import Tokenizer

PAIRS = [(f"ask {n}", f"def f{n}():\n    return {n}") for n in range(11)]
CONTEXT = Context(kind="block_diffusion", block_size=4)
OPTIONS = Evaluation(samples=10, times=(0.3, 0.9), microbatch=3)


def scorer(noised):
    """Find a token as likely as its id says, so that every sample has its own score."""
    sample, position = noised.row_index
    gold = noised.batch.ids[sample, position]
    return RowScores(gold / 7, gold % 2 == 0)


@pytest.fixture
def data(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
    prepare([write_chats(tmp_path / "chats.jsonl", PAIRS)], tokenizer, tmp_path / "data", max_length=128)
    return PreparedData(tmp_path / "data")


def score(data, shard):
    loader = Loader(columns=data, samples=3, block_size=4, shard=shard)
    return evaluate(scorer, CONTEXT, loader, OPTIONS, torch.device("cpu"))


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, pipeline=2)])
def test_every_sample_counts_once_however_ranks_share_them(data, layout, monkeypatch):
    alone, world, sums = score(data, DataShard()), 4, []
    shards = [layout.data_shard(rank, world) for rank in range(world)]
    monkeypatch.setattr(likelihood, "own_share", lambda: (0, world))
    monkeypatch.setattr(likelihood, "sum_over", lambda tensor: sums.append(tensor) or tensor)
    for shard in shards:
        score(data, shard)
    monkeypatch.setattr(likelihood, "sum_over", lambda tensor: torch.stack(sums).sum(dim=0))
    shared = score(data, shards[0])
    for name in ("nll", "correct", "masked", "reply_bytes"):
        assert torch.equal(getattr(shared, name), getattr(alone, name)), name
    assert shared.summary() == alone.summary()
    assert alone.masked[:, 1].sum() > alone.masked[:, 0].sum() > 0


@pytest.mark.parametrize("options", [{"times": ()}, {"times": (0.0,)}, {"samples": 0}, {"levels": 3}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        Evaluation(**options)


@pytest.mark.parametrize(
    "sizes", [(40,), (300, 100), (100, 300), (1, 200), (50, 50, 50, 2), (7, 0, 9), (120, 80, 40, 20, 10, 5)]
)
def test_every_beginning_of_the_draw_has_each_source_in_its_share(sizes):
    """And is no beginning of the file, holds each sample once, and is contained in every larger draw."""
    sources = numpy.repeat(numpy.arange(len(sizes)), sizes)
    total, drawn = sum(sizes), scored_samples(sources, sum(sizes) + 5)
    assert sorted(drawn) == list(range(total))
    assert drawn == scored_samples(sources, total)
    for size in (1, total // 10, total // 3, total // 2):
        first = scored_samples(sources, size)
        assert first == drawn[:size]
        counts = numpy.bincount(sources[first], minlength=len(sizes))
        assert numpy.all(numpy.abs(counts - size * numpy.array(sizes) / total) <= len(sizes))
    inside = [sample for sample in drawn if sources[sample] == 0]
    assert sizes[0] < 3 or inside != sorted(inside)


def test_a_sorted_file_is_not_judged_by_its_beginning():
    """Where the score of a sample grows along the file, a draw's mean is close to the whole's."""
    values = numpy.arange(4_000) / 4_000
    drawn = values[scored_samples(numpy.repeat([0, 1], 2_000), 400)]
    assert abs(drawn.mean() - values.mean()) < 0.03
