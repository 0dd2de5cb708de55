"""KL in both directions: values, gradients in closed form, and the slice of shared columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldens.dense import loss_values
from tests.unit.losses.pairs import CLOCK, pair, rows_for
from tide_megatron.losses.kl import Kl, ReverseKl

SHAPES = [(2.0, None), (1.0, None), (5.0, 6), (2.0, 1)]


def distributions(student, teacher, temperature, columns):
    """Return fp64 log-probabilities of both sides on the compared columns."""
    return [
        (side.detach().double()[:, :columns] / temperature).log_softmax(-1) for side in (student, teacher)
    ]


@pytest.mark.parametrize(("temperature", "shared"), SHAPES)
def test_forward_value_and_gradient(temperature, shared):
    student, teacher = pair()
    loss = Kl(teacher="t", temperature=temperature, shared_vocab_size=shared)
    values = loss_values(loss, student, teacher, rows_for(student), CLOCK)
    log_s, log_t = distributions(student, teacher, temperature, shared)
    expected = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=1e-6)
    values.sum().backward()
    grad = torch.zeros_like(student, dtype=torch.float64)
    grad[:, :shared] = temperature * (log_s.exp() - log_t.exp())
    torch.testing.assert_close(student.grad.double(), grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "shared"), SHAPES)
def test_reverse_value_and_gradient(temperature, shared):
    student, teacher = pair()
    loss = ReverseKl(teacher="t", temperature=temperature, shared_vocab_size=shared)
    values = loss_values(loss, student, teacher, rows_for(student), CLOCK)
    log_s, log_t = distributions(student, teacher, temperature, shared)
    divergence = (log_s.exp() * (log_s - log_t)).sum(-1)
    torch.testing.assert_close(values.double(), temperature**2 * divergence, atol=1e-6, rtol=1e-6)
    values.sum().backward()
    grad = torch.zeros_like(student, dtype=torch.float64)
    grad[:, :shared] = temperature * log_s.exp() * (log_s - log_t - divergence[:, None])
    torch.testing.assert_close(student.grad.double(), grad, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8), vocabulary=st.integers(2, 9))
def test_divergences_are_not_negative_and_vanish_on_equal_logits(seed, temperature, vocabulary):
    student, teacher = pair(vocabularies=(vocabulary, vocabulary), seed=seed)
    for loss in (Kl(teacher="t", temperature=temperature), ReverseKl(teacher="t", temperature=temperature)):
        assert (loss_values(loss, student, teacher, rows_for(student), CLOCK) > -1e-5).all()
        same = loss_values(loss, student, student.detach() + 3.0, rows_for(student), CLOCK)
        assert same.abs().max() < 1e-5 * temperature**2


def test_directions_differ_and_mirror_each_other():
    student, teacher = pair()
    forward = loss_values(Kl(teacher="t"), student, teacher, rows_for(student), CLOCK)
    reverse = loss_values(ReverseKl(teacher="t"), teacher, student, rows_for(student), CLOCK)
    torch.testing.assert_close(forward, reverse)
    assert not torch.allclose(
        forward, loss_values(ReverseKl(teacher="t"), student, teacher, rows_for(student), CLOCK)
    )


def test_columns_beyond_the_slice_do_not_matter():
    student, teacher = pair()
    loss = Kl(teacher="t", shared_vocab_size=4)
    values = loss_values(loss, student, teacher, rows_for(student), CLOCK)
    louder = teacher.clone()
    louder[:, 4:] += 50
    assert torch.equal(values, loss_values(loss, student, louder, rows_for(student), CLOCK))
