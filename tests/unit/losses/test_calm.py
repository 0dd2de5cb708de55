"""CALM and Reverse CALM: chunk sums, fp32 clamps, values, and gradients in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import loss_values
from tests.unit.losses.pairs import CLOCK, pair, rows_for
from tide_megatron.losses.calm import (
    Calm,
    ReverseCalm,
    bernoulli_cross_entropy,
    chunk_log_likelihoods,
    likelihood,
)


def test_chunk_sums_by_hand():
    """Token 1 belongs to two chunks, token 3 to none, chunk 2 has no token."""
    tokens = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    member, chunk = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    sums = chunk_log_likelihoods(tokens, member, chunk, 3)
    assert sums.tolist() == [-3.0, -6.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert tokens.grad.tolist() == [1.0, 11.0, 10.0, 0.0]


def test_likelihood_clamps_in_fp32_and_stops_gradients_there():
    values = torch.tensor([0.0, -40.0, -1.0], requires_grad=True)
    found = likelihood(values, 2.0)
    assert found.dtype == torch.float32
    assert found[0].item() == 1 - 2.0**-23
    assert found[1].item() == torch.tensor(1e-7).item()
    assert found[2].item() == pytest.approx(math.exp(-0.5))
    found.sum().backward()
    assert values.grad.tolist() == [0.0, 0.0, pytest.approx(math.exp(-0.5) / 2)]


def test_logarithms_bottom_out_where_fp32_says():
    """The clamp is not symmetric in fp32 (spec section 2): -16.118 below, -15.942 above."""
    low, high = likelihood(torch.tensor([-1e4, 0.0]), 1.0)
    assert math.log(low.item()) == pytest.approx(-16.118, abs=1e-3)
    assert (1 - high).log().item() == pytest.approx(-15.942, abs=1e-3)


def test_bernoulli_cross_entropy_by_hand():
    value = bernoulli_cross_entropy(torch.tensor(0.25), torch.tensor(0.5))
    assert value.item() == pytest.approx(math.log(2))
    value = bernoulli_cross_entropy(torch.tensor(0.25), torch.tensor(0.9))
    assert value.item() == pytest.approx(-0.25 * math.log(0.9) - 0.75 * math.log(0.1))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("kind", [Calm, ReverseCalm])
def test_value_and_closed_form_gradient_to_logits(kind, temperature):
    """dL/dL_s is -(t-s)/((1-s)T) or -(s/T) log(t/(1-t)); token logits get it times (onehot - p)."""
    student, teacher = pair(rows=7, vocabularies=(9, 11))
    rows = rows_for(student)
    loss = kind(teacher="t", temperature=temperature)
    values = loss_values(loss, student, teacher, rows, CLOCK)
    index = torch.arange(7)
    p_s, p_t = (side.detach().double().softmax(-1) for side in (student, teacher))
    s, t = (p[index, rows.gold] ** (1 / temperature) for p in (p_s, p_t))
    if kind is Calm:
        expected = -(t * s.log() + (1 - t) * (1 - s).log())
        slope = -(t - s) / ((1 - s) * temperature)
    else:
        expected = -(s * t.log() + (1 - s) * (1 - t).log())
        slope = -(s / temperature) * (t / (1 - t)).log()
    torch.testing.assert_close(values.double(), expected, atol=2e-6, rtol=2e-6)
    values.sum().backward()
    onehot = torch.nn.functional.one_hot(rows.gold, 9)
    torch.testing.assert_close(student.grad.double(), slope[:, None] * (onehot - p_s), atol=2e-6, rtol=2e-5)


def test_there_is_no_factor_of_t_squared():
    student, teacher = pair()
    rows = rows_for(student)
    flat = [
        loss_values(Calm(teacher="t", temperature=temperature), student, teacher, rows, CLOCK)
        for temperature in (50.0, 500.0)
    ]
    assert flat[1].max() < flat[0].max()  # both likelihoods go to 1, and the value to 0


def test_an_unlikely_token_gets_no_gradient():
    """Below the clamp, exp(L/T) < 1e-7, neither direction pulls (spec section 2)."""
    student = torch.tensor([[0.0, 50.0]], requires_grad=True)
    rows = rows_for(student)
    rows.gold[0] = 0
    for kind in (Calm, ReverseCalm):
        loss_values(kind(teacher="t"), student, torch.tensor([[3.0, 0.0]]), rows, CLOCK).sum().backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("kind", [Calm, ReverseCalm])
@pytest.mark.parametrize(("field", "value"), [("temperature", 0), ("weight", -1), ("shared_vocab_size", 4)])
def test_wrong_options_are_refused_by_name(kind, field, value):
    with pytest.raises(ValidationError, match=field):
        kind(teacher="t", **{field: value})
