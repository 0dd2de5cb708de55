"""No row depends on its batchmates: pads that a model would see are hidden, whatever blocks it has.

Samples are filled up to the student's block and padded to their batch's longest; a teacher reads them, or a
side of its own, by blocks of its own. Each sample is answered alone and in batches, and must answer alike.
"""

import dataclasses
import functools

import pytest
import torch

from tests.unit.diffusion.sides import random_side
from tests.unit.models.shapes import DENSE, build
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.views import Complementary, trimmed_view
from tide_megatron.models.attention import KERNELS
from tide_megatron.teachers.teacher import ViewBuilder, merge_passes

MASK, PAD = 60, 59
CONTEXTS = [
    Context(kind="bidirectional"),
    *(
        Context(kind=kind, block_size=size)
        for kind in ("block_causal", "block_diffusion")
        for size in (4, 6, 16)
    ),
]
FILLED = (1, 4, 8)
"""Blocks up to which samples are filled, the student's."""
SIZES = (13, 21, 5)
"""Tokens of three samples before that."""
SPLIT = Complementary(seed=5)
FORMS = {"plain": (None, 1), "one forward": (SPLIT, 1), "two forwards": (SPLIT, 2)}


def fill(tokens, block):
    return -(-tokens // block) * block


def batch_of(samples, block, *, length=None, is_cut=False):
    """Pad some of the three samples as the loader does: whole blocks, then to the longest, or to a length.

    With `is_cut` the filling of a block is not learnt, like pads.
    """
    rows = []
    for number in samples:
        ids = torch.randint(
            0, 50, (fill(SIZES[number], block),), generator=torch.Generator().manual_seed(number)
        )
        labels = ids.clone()
        labels[: 2 + number] = IGNORED
        labels[SIZES[number] :] = IGNORED if is_cut else labels[SIZES[number] :]
        rows.append((ids, labels))
    length = length or max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.stack(
            [torch.nn.functional.pad(row[part], (0, length - len(row[part])), value=value) for row in rows]
        )
        for part, value in ((0, PAD), (1, IGNORED))
    )
    numbers = torch.tensor(samples)
    sides = {"own": side_of(samples)}
    return Batch(
        sample_ids=numbers, epochs=numbers * 0, ids=ids, labels=labels, reply_bytes=numbers + 1, sides=sides
    )


def side_of(samples):
    """Give each of the samples its side, of another length than the student's tokens."""
    sizes = [SIZES[number] + 1 - 2 * number for number in samples]
    alone = [
        random_side(torch.Generator().manual_seed(7 + number), 1, SIZES[number], size)
        for number, size in zip(samples, sizes, strict=True)
    ]
    length = max(sizes)
    return dataclasses.replace(
        alone[0],
        ids=torch.cat(
            [torch.nn.functional.pad(side.ids, (0, length - side.ids.shape[1]), value=PAD) for side in alone]
        ),
        lengths=torch.tensor(sizes),
        spans=torch.cat([side.spans for side in alone]),
        sample=torch.cat([side.sample + place for place, side in enumerate(alone)]),
        number=torch.cat([side.number for side in alone]),
    )


def noised(batch):
    """Mask most tokens that may be masked, by the sample alone, the last one of each always."""
    chosen = torch.stack(
        [
            torch.rand(64, generator=torch.Generator().manual_seed(40 + number))[: batch.ids.shape[1]] < 0.6
            for number in batch.sample_ids.tolist()
        ]
    )
    place = torch.arange(batch.ids.shape[1])
    masked = batch.maskable & (chosen | (place == batch.lengths[:, None] - 1))
    return Noised(batch=batch, time=torch.full((len(batch.ids),), 0.6), masked=masked)


def answers(model, builder, teacher, batch):
    """Return the rows of each sample, by its number."""
    example = noised(batch)
    views = builder.views(teacher, example)
    rows = merge_passes(views, [model.rows(view) for view in views])
    sample = example.reading(teacher).index[0]
    return {number: rows[sample == place] for place, number in enumerate(batch.sample_ids.tolist())}


BATCHES = [((0, 1, 2), None), ((2, 0), 32)]
"""Which samples, and padded to how many tokens; None: to the longest."""


@pytest.fixture(scope="module")
def model(groups):
    return build(DENSE, groups, num_hidden_layers=1)


def check(answer, block, **options):
    """Compare each sample's rows in batches with its rows alone."""
    alone = {number: answer(batch_of((number,), block, **options))[number] for number in range(3)}
    assert sum(map(len, alone.values())) > 6
    for samples, length in BATCHES:
        for number, rows in answer(batch_of(samples, block, length=length, **options)).items():
            torch.testing.assert_close(rows, alone[number], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "form", "context"),
    [
        *(("dense", form, context) for form in ("one forward", "two forwards") for context in CONTEXTS),
        *(("structured", "plain", context) for context in CONTEXTS),
        *(("flex", "one forward", context) for context in CONTEXTS if context.block_size == 6),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_teachers_rows_do_not_depend_on_batchmates(model, kernel, form, context):
    model.make_kernel = KERNELS[kernel]
    split, forwards = FORMS[form]
    builder = ViewBuilder(context=context, mask_id=MASK, complementary=split, forwards=forwards)
    for teacher, block in (*(("shared", block) for block in FILLED), ("own", 1)):
        check(functools.partial(answers, model, builder, teacher), block)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@torch.no_grad()
def test_the_students_rows_do_not_depend_on_batchmates(model, context, is_cut):
    """Also where the filling of the last block is not learnt, or samples were filled to another block."""
    model.make_kernel = KERNELS["structured"]

    def answer(batch):
        example = noised(batch)
        rows, sample = model.rows(trimmed_view(example, context, MASK)), example.row_index[0]
        return {number: rows[sample == place] for place, number in enumerate(batch.sample_ids.tolist())}

    own = 1 if context.kind == "bidirectional" else context.block_size
    for block in {own, *FILLED}:
        check(answer, block, is_cut=is_cut)


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_pads_that_nobody_sees_cost_nothing(context):
    """Without lengths attention is what it always was, bit by bit."""
    block = 1 if context.kind == "bidirectional" else context.block_size
    for samples, length in BATCHES:
        view = trimmed_view(noised(batch_of(samples, block, length=length)), context, MASK)
        assert (view.segments is None) == (context.kind != "bidirectional")


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@torch.no_grad()
def test_a_longer_view_answers_alike(model, context):
    """As stages and FlexAttention ask for it, by any length."""
    model.make_kernel = KERNELS["dense"]
    example = noised(batch_of((0,), 1))
    (view,) = ViewBuilder(context=context, mask_id=MASK).views("shared", example)
    wanted = model.rows(view)
    for samples, length in ((1, view.length + 1), (2, view.length + 19), (3, view.length)):
        found = model.rows(view.padded(samples, length))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
