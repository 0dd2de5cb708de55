"""What every loss of the table promises, whichever formula it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import loss_values
from tests.unit.losses.pairs import CLOCK, has_teacher, pair, rows_for
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.losses import LOSSES
from tide_megatron.losses.base import ColumnLoss, LikelihoodLoss, Loss


def make(name, **options):
    """Build a loss of the table; give it a teacher's name where it takes one."""
    kind = LOSSES[name]
    return kind(teacher="t", **options) if has_teacher(kind) else kind(**options)


def test_the_papers_losses_have_the_papers_names():
    shared = {"cross_entropy", "kl", "reverse_kl", "tidal"}
    assert set(LOSSES) >= shared | {"calm", "reverse_calm", "calm_tidal", "reverse_calm_tidal"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_own_frozen_configuration(name):
    loss = make(name, weight=3)
    assert isinstance(loss, Loss)
    assert loss.weight == 3.0
    assert loss.teacher == ("t" if has_teacher(type(loss)) else None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.weight = 1.0
    with pytest.raises(ValidationError, match="wieght"):
        make(name, wieght=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_of_one_family(name):
    """The head asks which: a loss of none would be left out, one of both counted twice."""
    loss = make(name)
    assert isinstance(loss, LikelihoodLoss) != isinstance(loss, ColumnLoss)
    student, _ = pair()
    rows = rows_for(student)
    assert torch.equal(loss.item_sample(rows), rows.sample)


@pytest.mark.parametrize("name", LOSSES)
def test_weight_and_temperature_unless_said_otherwise_are_the_papers(name):
    loss = make(name)
    assert loss.weight == 1.0
    assert getattr(loss, "temperature", 2.0) == 2.0
    assert make(name, weight=0).weight == 0.0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_distilling_losses_must_name_their_teacher(name):
    assert make(name, temperature=0.5).temperature == 0.5
    with pytest.raises(ValidationError, match="teacher"):
        LOSSES[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_fp32_per_row_also_for_bf16_logits(name):
    student, teacher = pair()
    rows = rows_for(student)
    loss = make(name)
    rounded = [side.detach().bfloat16() for side in (student, teacher)]
    values = loss_values(loss, *rounded, rows, CLOCK)
    assert values.dtype == torch.float32
    assert values.shape == (5,)
    assert torch.equal(values, loss_values(loss, *[side.float() for side in rounded], rows, CLOCK))
    coefficients = loss.coefficients(rows, CLOCK)
    assert coefficients.dtype == torch.float32
    assert coefficients.shape == (5,)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_give_no_values_but_a_graph(name):
    student, teacher = pair(rows=0)
    rows = rows_for(student)
    loss = make(name)
    total = (loss.coefficients(rows, CLOCK) * loss_values(loss, student, teacher, rows, CLOCK)).sum()
    total.backward()
    assert total.item() == 0.0
    assert student.grad.shape == (0, 9)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_do_not_see_each_other(name):
    """A row's value and gradient are the same whatever rows stand beside it."""
    student, teacher = pair()
    rows = rows_for(student)
    loss = make(name)
    values = loss_values(loss, student, teacher, rows, CLOCK)
    order = torch.tensor([3, 0])
    some = dataclasses.replace(rows, gold=rows.gold[order], sample=rows.sample[order])
    torch.testing.assert_close(loss_values(loss, student[order], teacher[order], some, CLOCK), values[order])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_distilling_losses_count_hidden_rows(name):
    ids = torch.arange(12).reshape(2, 6)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 3] = hidden[1, 5] = True
    batch = Batch(
        sample_ids=torch.arange(2), epochs=torch.zeros(2), ids=ids, labels=labels, reply_bytes=torch.ones(2)
    )
    count = make(name).count(Noised(batch=batch, time=torch.ones(2), masked=hidden))
    assert count.item() == 3
    assert count.dtype == torch.float64
    assert count.shape == ()
