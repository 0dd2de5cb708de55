"""Both sides of the step bench make the same update, and its ranks read the same text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from bench.plain_step import plain_step
from bench.step_case import CLOCK, TEACHER, Setting, batch_of, given_of, make_run, make_student, own_batches
from tide_megatron.base.device import choose_device
from tide_megatron.train.step import train_step

PIPELINES = ["shared", "cross"]
SMALL = Setting(
    pipeline="shared",
    precision="fp32",
    length=64,
    hidden=32,
    vocabulary=400,
    teacher_vocabulary=430,
    initial_deviation=0.2,  # logits large enough for the models to differ
)


def of(pipeline):
    return dataclasses.replace(SMALL, pipeline=pipeline)


def weights(student):
    return {name: value.detach().clone() for name, value in student.model.named_parameters()}


def both_steps(setting, steps, spoil=None):
    """Make updates both ways; return each one's figures, and weights before and after."""
    device = choose_device("cpu")
    run, student = make_run(setting, device), make_student(setting, device)
    teacher, before, figures = run.teachers[TEACHER].model, weights(student), []
    for number in range(steps):
        batch = batch_of(setting, number)
        given = given_of(run, batch)
        if spoil is not None:
            given = dataclasses.replace(given, **spoil(given))
        objective, update = plain_step(student, teacher, given, CLOCK)
        result = train_step(run, run.read([batch]), CLOCK)
        assert result.update.applied
        figures.append((result.objective, objective, result.update.grad_norm, update.grad_norm))
    return figures, before, weights(student), weights(run.student)


def moved_apart(before, plain, ours):
    """Return the largest difference of two updates over the largest update, of the worst parameter."""
    moves = {name: (plain[name] - before[name]).abs().max() for name in before}
    assert min(moves.values()) > 0, "every weight moves"
    return max(float((ours[name] - plain[name]).abs().max() / moves[name]) for name in before)


def show_nothing(given):
    """One view in which everything is masked, read twice."""
    return {"shown": torch.zeros_like(given.shown)}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_both_ways_make_the_same_updates(pipeline, pool):
    ((figures, *found),) = pool(1).run(both_steps, of(pipeline), 3)
    for ours, plain, our_norm, plain_norm in figures:
        assert ours == pytest.approx(plain, rel=1e-6)
        assert our_norm == pytest.approx(plain_norm, rel=1e-5)
    assert moved_apart(*found) < 1e-3


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_two_views_matter(pipeline, pool):
    """Else the plain way could read one view twice, and nobody would see it."""
    ((((ours, plain, *_),), *_),) = pool(1).run(both_steps, of(pipeline), 1, show_nothing)
    assert abs(ours - plain) / plain > 1e-5


def texts(setting, microbatches, epoch):
    return [
        (batch.sample_ids.tolist(), batch.ids.tolist()) for batch in own_batches(setting, microbatches, epoch)
    ]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_ranks_read_what_one_reads(pipeline, pool):
    (alone,) = pool(1).run(texts, of(pipeline), 4, 1)
    first, second = pool(2).run(texts, of(pipeline), 4, 1)
    assert first + second == alone
    assert len(first) == len(second) == 2
    assert len({sample for samples, _ in alone for sample in samples}) == 8


def hidden_of(setting):
    assert dist.get_world_size() == 1
    run, batch = make_run(setting, choose_device("cpu")), batch_of(setting, 0)
    given = given_of(run, batch)
    return given.batch.masked, given.shown, given.teacher_masked


def test_sizes_of_the_figures(pool):
    """About half of 424 tokens hidden in each of two samples, half of these shown first."""
    setting = dataclasses.replace(SMALL, length=512)
    ((masked, shown, teacher_masked),) = pool(1).run(hidden_of, setting)
    assert int(masked.sum()) == pytest.approx(424, abs=50)
    assert not masked[:, :88].any()
    assert torch.equal(masked, teacher_masked)
    assert shown.sum() / masked.sum() == pytest.approx(0.5, abs=0.1)
