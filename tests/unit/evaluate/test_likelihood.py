"""Held-out scores: whoever scores which samples, every sample counts once; and what options may be."""

import pydantic
import pytest
import torch

from tests.small_tokenizer import write_chats, write_tokenizer
from tide_megatron.data.columns import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.prepare import prepare
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate import likelihood
from tide_megatron.evaluate.likelihood import evaluate
from tide_megatron.evaluate.options import Evaluation
from tide_megatron.parallel.layout import DataShard, Layout
from tide_megatron.text.tokenizer import Tokenizer

PAIRS = [(f"ask {n}", f"def f{n}():\n    return {n}") for n in range(11)]
CONTEXT = Context(kind="block_diffusion", block_size=4)
OPTIONS = Evaluation(samples=10, times=(0.3, 0.9), microbatch=3)


def scorer(noised):
    """Find a token as likely as its id says, so that every sample has its own score."""
    sample, position = noised.row_index
    gold = noised.batch.ids[sample, position]
    return gold / 7, gold % 2 == 0


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
