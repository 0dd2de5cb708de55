"""Both sides of the head-loss bench compute the same thing, on all the shapes it draws."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.head_case import Setting, draw_case
from bench.head_loss import Way, measure_peak, measure_times, our_work, plain_work

SMALL = Setting(
    loss="tidal",
    precision="fp32",
    length=48,
    hidden=24,
    teacher_hidden=20,
    vocabulary=211,
    shared=190,
    samples=3,
    seed=5,
)
FORMS = ["plain", "fused"]
LOSSES = ["tidal", "reverse_calm"]


def of(loss, **changes):
    return dataclasses.replace(SMALL, loss=loss, **changes)


def drawn(loss, **changes):
    """Draw a case with logits large enough for the models to differ: few hidden units make small ones."""
    case = draw_case(of(loss, **changes))
    assert case.teacher.hidden.shape[1] == (2 * SMALL.length if loss == "tidal" else case.text.asked.shape[1])
    for model in (case.student, case.teacher):
        model.weight.mul_(30.0)
    return case


def relative(ours, truth):
    return ((ours - truth).abs().max() / truth.abs().max()).item()


def gradients(case, work):
    """Return the objective, the gradient of the hidden rows among the student's positions, and the head's."""
    case.gradient.zero_()
    objective, hidden = work()
    if hidden.dim() == 2:
        everywhere = torch.zeros_like(case.student.hidden)
        everywhere[:, : case.text.ids.shape[1]][case.text.masked] = hidden
        hidden = everywhere
    return objective, hidden.clone(), case.gradient.clone()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("copies", [1, 3])
def test_both_sides_are_equal(loss, form, copies):
    case = drawn(loss, copies=copies)
    plain = gradients(case, plain_work(case))
    ours = gradients(case, our_work(case, Way(form=form, budget_mib=64)))
    assert relative(ours[0], plain[0]) < 1e-6
    assert relative(ours[1], plain[1]) < 1e-5
    assert relative(ours[2], plain[2]) < 1e-5
    assert plain[2].abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_matters(loss):
    """Weights of cross-entropy alone would make any two sides equal."""
    case = drawn(loss)
    objective, hidden, _ = gradients(case, plain_work(case))
    case.teacher.weight.mul_(-1.0)
    other, other_hidden, _ = gradients(case, plain_work(case))
    assert relative(other, objective) > 1e-4
    assert relative(other_hidden, hidden) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_add_up_call_by_call(loss):
    case = drawn(loss)
    work = plain_work(case)
    once = gradients(case, work)[2]
    work()
    assert relative(case.gradient, 2 * once) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_the_full_size(loss):
    """The sizes that the figures are for: about 425 hidden rows of 512-token samples."""
    case = draw_case(Setting(loss=loss, hidden=1, teacher_hidden=1, vocabulary=600, shared=600, seed=5))
    rows, teacher_rows = case.hidden_rows
    assert len(rows) == pytest.approx(425, abs=8)
    assert len(teacher_rows) == pytest.approx(len(rows), abs=40)
    assert case.student.hidden.shape[:2] == (2, 1024)
    assert case.text.maskable.tolist() == [424, 424]
    assert not case.text.masked[:, :88].any()


def test_chunks_are_runs_of_one_to_three_and_one_to_four():
    text = draw_case(of("reverse_calm", length=400, vocabulary=600)).text
    sizes = [(end - start, last - first) for _, start, end, first, last in text.chunks]
    assert {mine for mine, _ in sizes} == {1, 2, 3}
    assert {theirs for _, theirs in sizes} == {1, 2, 3, 4}
    assert sum(mine for mine, _ in sizes) == text.masked.sum()
    assert sum(theirs for _, theirs in sizes) == text.asked.sum()


@pytest.mark.parametrize("copies", [1, 2])
def test_chunks_cover_what_is_hidden_in_every_copy(copies):
    text = draw_case(of("reverse_calm", copies=copies)).text
    mine, theirs, active = text.matrices()
    assert torch.equal(mine.any(-1), text.masked)
    assert torch.equal(theirs.any(-1), text.asked)
    assert active.sum() == len(text.chunks)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_settings_give_equal_numbers(loss):
    one, same = draw_case(of(loss)), draw_case(of(loss))
    assert torch.equal(one.student.weight, same.student.weight)
    assert torch.equal(one.text.masked, same.text.masked)


def test_times_are_of_all_three_works():
    found = measure_times(SMALL, Way(form="plain", rounds=1))
    assert set(found["costs"]) == {"plain", "ours", "floor"}
    assert min(cost.cpu for cost in found["costs"].values()) > 0
    assert found["positions"] == 3 * 2 * 48


def test_peaks_grow_with_logits():
    """Logits of 8 MiB and more stand out of what a process allocates anyway."""
    wide = dataclasses.replace(SMALL, vocabulary=16_000, shared=15_000)
    found = measure_peak(wide, Way(form="plain"), "plain")
    logits = 3 * (2 + 2) * 48 * 16_000 * 4
    assert found["peak"] > logits
    assert found["gradient"] == 3 * 2 * 48 * 24 * 4
