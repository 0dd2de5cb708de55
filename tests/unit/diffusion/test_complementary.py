"""Complementary views: the split, what each view shows, and which rows it answers."""

import dataclasses

import pytest
import torch

from tests.unit.diffusion.sides import random_batch
from tide_megatron.base.errors import ConfigError
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import (
    Complementary,
    complementary_passes,
    complementary_view,
    teacher_view,
)

MASK = 99
CONTEXTS = [
    Context(kind="bidirectional"),
    Context(kind="block_causal", block_size=4),
    Context(kind="block_diffusion", block_size=4),
]


def example(teacher, seed=3):
    noised = Noiser(seed=seed).at(random_batch(seed), 0.6)
    reading = noised.reading(teacher)
    return noised, reading, Complementary(seed=7).shown(noised.batch, reading)


@pytest.mark.parametrize("teacher", ["t0", "another"])
def test_the_split_is_of_hidden_tokens_and_fair(teacher):
    shown, hidden = 0, 0
    for seed in range(40):
        _, reading, split = example(teacher, seed)
        assert not (split & ~reading.masked).any()
        shown, hidden = shown + int(split.sum()), hidden + int(reading.masked.sum())
    assert 0.4 < shown / hidden < 0.6


def test_tokens_of_a_chunk_are_shown_together():
    for seed in range(10):
        noised, _, split = example("t0", seed)
        side = noised.batch.sides["t0"]
        for sample, span in zip(side.sample.tolist(), side.spans.tolist(), strict=True):
            assert len(set(split[sample, span[2] : span[3]].tolist())) == 1


@pytest.mark.parametrize("teacher", ["t0", "another"])
def test_the_split_depends_on_the_sample_alone(teacher):
    noised, reading, split = example(teacher)
    other = Complementary(seed=8).shown(noised.batch, reading)
    assert not torch.equal(split, other)
    assert torch.equal(split, Complementary(seed=7).shown(noised.batch, reading))
    batch = noised.batch.to(torch.device("cpu"))
    batch.epochs[0] += 1
    again = Complementary(seed=7).shown(batch, reading)
    assert torch.equal(split[1:], again[1:])
    assert not torch.equal(split[0], again[0])


@pytest.mark.parametrize(("share", "views"), [(0.0, (True, False)), (1.0, (False, True))])
def test_at_share_0_or_1_one_view_has_everything(share, views):
    noised, reading, _ = example("t0")
    shown = Complementary(seed=7, share=share).shown(noised.batch, reading)
    passes = complementary_passes(reading, shown, CONTEXTS[0], MASK)
    assert tuple(len(view.rows) > 0 for view in passes) == views


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"shown_share: 1\.5 is not in \[0, 1\]"):
        Complementary(seed=1, share=1.5)


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.kind)
@pytest.mark.parametrize("teacher", ["t0", "another"])
def test_each_pass_hides_what_the_other_shows(teacher, context):
    _, reading, shown = example(teacher)
    first, second = complementary_passes(reading, shown, context, MASK)
    length = first.length
    hidden = [(view.ids[:, :length] == MASK) for view in (first, second)]
    assert torch.equal(hidden[0] | hidden[1], reading.masked)
    assert not (hidden[0] & hidden[1]).any()
    assert torch.equal(hidden[1], shown)
    for view in (first, second):  # every row that is asked is masked in its own view
        assert (view.ids.flatten()[view.rows] == MASK).all()
        assert torch.equal(
            view.ids.where(view.ids != MASK, 0)[:, :length].bool(),
            (view.ids[:, :length] != MASK) & (reading.ids != 0),
        )
    assert len(first.rows) + len(second.rows) == int(reading.targets.sum())


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.kind)
@pytest.mark.parametrize("teacher", ["t0", "another"])
def test_one_forward_holds_both_passes_and_keeps_the_order_of_rows(teacher, context):
    _, reading, shown = example(teacher)
    both = complementary_view(reading, shown, context, MASK)
    first, second = complementary_passes(reading, shown, context, MASK)
    samples, length = reading.ids.shape
    assert (both.ids.flatten()[both.rows] == MASK).all()
    assert len(both.rows) == int(reading.targets.sum())
    if context.kind == "block_diffusion":
        assert torch.equal(both.ids[:, :length], first.ids[:, :length])
        assert torch.equal(both.ids[:, length : 2 * length], second.ids[:, :length])
        assert torch.equal(both.ids[:, 2 * length :], reading.ids)
        assert both.context.parts == 3
        place = both.rows % length + both.rows // (3 * length) * length
    else:
        assert torch.equal(both.ids, torch.cat([first.ids, second.ids]))
        place = both.rows % (samples * length)
    assert torch.equal(place, reading.targets.flatten().nonzero()[:, 0])


def test_padding_behind_the_longest_sample_is_cut_in_whole_blocks():
    batch = random_batch(3)
    labels = batch.labels.clone()
    labels[:, 9:] = -100
    short = type(batch)(
        **{name: getattr(batch, name) for name in ("sample_ids", "epochs", "ids", "reply_bytes")},
        labels=labels,
    )
    reading = Noiser(seed=1).at(short, 0.9).reading("another")
    assert [teacher_view(reading, context, MASK).length for context in CONTEXTS] == [9, 12, 12]
    for context in CONTEXTS:
        assert teacher_view(reading, context, MASK).segments.tokens.tolist() == [9, 9, 9]
    blocks = dataclasses.replace(CONTEXTS[2], block_size=3)
    assert teacher_view(reading, blocks, MASK).segments is None
