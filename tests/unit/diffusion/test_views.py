"""Views: what stands where in [x_t ; x_0], positions, and the rows to predict."""

from __future__ import annotations

import dataclasses

import torch

from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.segments import Segments
from tide_megatron.diffusion.views import plain_view, trimmed_view

MASK = 99


def noised():
    """Two samples of four tokens; three hidden in all."""
    ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    batch = Batch(
        sample_ids=torch.arange(2), epochs=torch.zeros(2), ids=ids, labels=ids, reply_bytes=torch.ones(2)
    )
    hidden = torch.tensor([[False, True, False, True], [True, False, False, False]])
    return Noised(batch=batch, time=torch.tensor([0.5, 0.25]), masked=hidden)


def test_block_diffusion_view_is_noised_then_clean():
    view = plain_view(noised(), Context(kind="block_diffusion", block_size=2), MASK)
    assert view.ids.tolist() == [[10, 99, 12, 99, 10, 11, 12, 13], [99, 21, 22, 23, 20, 21, 22, 23]]
    assert view.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
    assert view.length == 4
    assert view.rows.tolist() == [1, 3, 8]


def test_one_part_views_hold_the_noised_sequence_alone():
    for kind in ("bidirectional", "block_causal"):
        view = plain_view(noised(), Context(kind=kind), MASK)
        assert view.ids.tolist() == [[10, 99, 12, 99], [99, 21, 22, 23]]
        assert view.positions.tolist() == [[0, 1, 2, 3]] * 2
        assert view.rows.tolist() == [1, 3, 4]


def test_rows_pick_the_masked_copy_of_each_hidden_token():
    example = noised()
    for kind in ("bidirectional", "block_diffusion"):
        view = plain_view(example, Context(kind=kind), MASK)
        assert (view.ids.flatten()[view.rows] == MASK).all()
        sample, position = example.row_index
        assert example.batch.ids[sample, position].tolist() == [11, 13, 20]


def test_segments_travel_with_the_view():
    segments = Segments.of_rows(torch.tensor([4, 2]))
    assert plain_view(noised(), Context(kind="bidirectional"), MASK, segments).segments is segments
    assert plain_view(noised(), Context(kind="bidirectional"), MASK).segments is None


def test_a_model_is_told_where_pads_begin_where_it_would_see_one():
    """Pads follow the last maskable token; a prompt in front counts, a hole in the middle does too."""
    example = noised()
    labels = example.batch.labels.clone()
    labels[0, 2:] = labels[1, 0] = labels[1, 2] = IGNORED
    example = dataclasses.replace(example, batch=dataclasses.replace(example.batch, labels=labels))
    assert example.batch.lengths.tolist() == [2, 4]
    assert trimmed_view(example, Context(kind="bidirectional"), MASK).segments.tokens.tolist() == [2, 4]
    for kind in ("block_causal", "block_diffusion"):
        for block, lengths in ((1, None), (2, None), (3, [2, 4]), (4, [2, 4]), (32, [2, 4])):
            found = trimmed_view(example, Context(kind=kind, block_size=block), MASK).segments
            assert (found if found is None else found.tokens.tolist()) == lengths


def test_nothing_hidden_gives_no_rows():
    example = noised()
    nothing = Noised(batch=example.batch, time=example.time, masked=torch.zeros_like(example.masked))
    view = plain_view(nothing, Context(kind="block_diffusion"), MASK)
    assert view.rows.shape == (0,)
    assert torch.equal(view.ids[:, :4], example.batch.ids)


def test_ignored_labels_are_those_of_torch():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


def test_maskable_is_what_labels_allow():
    example = noised().batch
    labels = example.labels.clone()
    labels[0, 0] = IGNORED
    other = Batch(
        sample_ids=example.sample_ids,
        epochs=example.epochs,
        ids=example.ids,
        labels=labels,
        reply_bytes=example.reply_bytes,
    )
    assert other.maskable.tolist() == [[False, True, True, True], [True] * 4]


def test_lengths_reach_to_the_last_maskable_token():
    batch = noised().batch
    labels = torch.tensor([[IGNORED, 11, IGNORED, IGNORED], [20, IGNORED, IGNORED, 23]])
    fields = {**vars(batch), "labels": labels}
    assert Batch(**fields).lengths.tolist() == [2, 4]
    nothing = Batch(**{**fields, "labels": torch.full_like(labels, IGNORED)})
    assert nothing.lengths.tolist() == [0, 0]


def test_a_shifted_view_asks_one_position_earlier_inside_each_part():
    view = plain_view(noised(), Context(kind="block_diffusion", block_size=2), MASK)
    rows = torch.arange(view.ids.numel())
    moved = dataclasses.replace(view, rows=rows).shifted().rows.view(-1, view.length)
    first, *rest = range(view.length)
    assert all((part - part[0]).tolist() == [first, first, *rest[:-1]] for part in moved)
    assert torch.equal(moved[:, 0], rows[:: view.length])
    assert torch.equal(view.shifted().ids, view.ids)
