"""CALM and Reverse CALM: chunk sums, clamps, values and gradients in closed form, digits near 0 and 1."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import loss_values
from tests.operations import Repeated
from tests.unit.losses.pairs import CLOCK, pair, rows_for
from tide_megatron.diffusion.alignment import same_rows
from tide_megatron.losses.calm import (
    Bernoulli,
    Calm,
    CalmTidal,
    ReverseCalm,
    ReverseCalmTidal,
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


def test_chunk_sums_have_one_order_on_every_device():
    tokens = torch.randn(6, requires_grad=True)
    with Repeated() as repeated:
        member, chunk = torch.arange(6), torch.tensor([0, 0, 1, 1, 1, 2])
        chunk_log_likelihoods(tokens, member, chunk, 3).square().sum().backward()
    # Backward of an index is `index_put`, which CUDA sorts; each token is in one chunk here and adds once.
    assert repeated.names <= {"index_put", "_index_put_impl_"}


def test_likelihoods_are_clamped_and_gradients_stop_there():
    values = torch.tensor([0.0, -1e-7, -40.0, -1.0], requires_grad=True)
    found = likelihood(values, 2.0)
    assert {part.dtype for part in found} == {torch.float32}
    assert found.rest[:2].tolist() == pytest.approx([1e-7, 1e-7])
    assert found.p.tolist()[2:] == pytest.approx([1e-7, math.exp(-0.5)])
    assert found.log_p.tolist()[2:] == pytest.approx([math.log(1e-7), -0.5])
    assert found.log_rest.tolist()[:2] == pytest.approx([math.log(1e-7)] * 2)
    found.p.sum().backward()
    assert values.grad.tolist() == [0.0, 0.0, 0.0, pytest.approx(math.exp(-0.5) / 2)]


LOGS = [-2e-7, -3e-7, -1e-5, -3e-4, -0.02, -0.69, -0.7, -1.5, -9.0, -15.9]
"""Of a student's chunk; a teacher's are a little larger, so that no coefficient is a difference of equals."""


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("kind", [Calm, ReverseCalm, CalmTidal, ReverseCalmTidal])
def test_values_and_coefficients_have_digits_at_both_ends(kind, temperature):
    """Against the same formulas in fp64, each pair by itself."""
    student, teacher = (
        part.flatten() * temperature
        for part in torch.meshgrid(torch.tensor(LOGS), 0.75 * torch.tensor(LOGS), indexing="ij")
    )
    student.requires_grad_(True)
    rows = dataclasses.replace(rows_for(torch.zeros(len(student), 2)), time=torch.full((3,), 0.4))
    loss = kind(teacher="t", temperature=temperature)
    values = loss.from_likelihoods(student, teacher, rows, CLOCK)
    (slopes,) = torch.autograd.grad(values.sum(), student)
    low = student.detach().double() / temperature
    s, t = low.exp(), (teacher.double() / temperature).exp()
    not_s, not_t = (-torch.expm1(part.double() / temperature) for part in (student.detach(), teacher))
    if kind in (CalmTidal, ReverseCalmTidal):
        share = float(loss.teacher_share(torch.tensor(0.4), CLOCK))
        t, not_t = (1 - share) * s + share * t, (1 - share) * not_s + share * not_t
    if kind in (Calm, CalmTidal):
        wanted = -(t * torch.log1p(-not_s) + not_t * not_s.log())
        coefficients = (t * -not_s + not_t * s) / not_s
    else:
        wanted = -(s * torch.log1p(-not_t) + not_s * not_t.log())
        coefficients = -s * (torch.log1p(-not_t) - not_t.log())
    torch.testing.assert_close(values.double(), wanted, rtol=4e-6, atol=0)
    scale = coefficients.abs() + (t if kind in (Calm, CalmTidal) else s)
    assert ((slopes * temperature - coefficients).abs() / scale).max() < 4e-6


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", [Calm, ReverseCalm, CalmTidal, ReverseCalmTidal])
def test_a_chunk_without_tokens_is_refused(kind, side):
    """It would count as certain: log 1."""
    student, teacher = pair()
    rows = rows_for(student)
    link = same_rows(rows.gold, rows.sample)
    member, chunk = getattr(link, f"{side}_rows")
    kept = chunk != 2
    spoilt = dataclasses.replace(link, **{f"{side}_rows": (member[kept], chunk[kept])})
    loss = kind(teacher="t")
    loss_values(loss, student, teacher, dataclasses.replace(rows, links={"t": link}), CLOCK)
    with pytest.raises(RuntimeError, match=f"a chunk has no token of the {side}"):
        loss_values(loss, student, teacher, dataclasses.replace(rows, links={"t": spoilt}), CLOCK)


def test_bernoulli_cross_entropy_by_hand():
    low, half, high = (Bernoulli.of(torch.tensor(p).log()) for p in (0.25, 0.5, 0.9))
    assert bernoulli_cross_entropy(low, half).item() == pytest.approx(math.log(2))
    value = bernoulli_cross_entropy(low, high)
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
