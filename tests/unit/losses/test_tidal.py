"""TIDAL: lambda on its axes, the timestep weight, the value, and the gradient in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import loss_values
from tests.unit.losses.pairs import pair, rows_for
from tide_megatron.base.clock import Clock
from tide_megatron.losses.kl import Kl
from tide_megatron.losses.tidal import Tidal

TIMES = torch.tensor([0.0, 0.25, 1.0])


def trained(growth, step, total=100, initial=0.1, maximum=0.9):
    """Write lambda_train out."""
    done = step / total
    grown = (1 - math.cos(math.pi * done)) / 2 if growth == "cosine" else done
    return initial + (maximum - initial) * grown


@pytest.mark.parametrize("growth", ["cosine", "linear"])
@pytest.mark.parametrize("step", [0, 37, 100])
def test_teacher_share_on_every_axis(growth, step):
    clock = Clock(step=step, total_steps=100)
    now = trained(growth, step)
    expected = {
        "both": [now, 0.75 * now, 0.0],
        "training_only": [now, now, now],
        "timestep_only": [0.9, 0.675, 0.0],
    }
    for axes, shares in expected.items():
        found = Tidal(teacher="t", axes=axes, growth=growth).teacher_share(TIMES, clock)
        torch.testing.assert_close(found, torch.tensor(shares))


def test_share_grows_from_initial_to_maximum_over_applied_updates():
    loss = Tidal(teacher="t", axes="training_only", initial=0.3, maximum=0.6)
    shares = [loss.teacher_share(TIMES, Clock(step=step, total_steps=10))[0].item() for step in (0, 5, 10)]
    assert shares == pytest.approx([0.3, 0.45, 0.6])
    skipped = Clock(step=5, total_steps=10, consumed=999, skipped=3)
    assert loss.teacher_share(TIMES, skipped)[0].item() == pytest.approx(0.45)


def test_timestep_weights():
    student, _ = pair()
    rows = rows_for(student)
    clock = Clock()
    assert Tidal(teacher="t").coefficients(rows, clock).tolist() == [1.0] * 5
    weights = Tidal(teacher="t", timestep_weight="midrange").coefficients(rows, clock)
    levels = [0.2, 0.55, 0.9, 0.2, 0.55]
    assert weights.tolist() == pytest.approx(
        [math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)) for t in levels], rel=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("shared", [None, 6])
@pytest.mark.parametrize("axes", ["both", "training_only", "timestep_only"])
def test_value_and_closed_form_gradient(temperature, shared, axes):
    """The gradient is T (p_s - r) on the first columns, 0 elsewhere (spec section 2)."""
    student, teacher = pair()
    rows, clock = rows_for(student), Clock(step=37, total_steps=100)
    loss = Tidal(teacher="t", temperature=temperature, shared_vocab_size=shared, axes=axes)
    values = loss_values(loss, student, teacher, rows, clock)
    scaled = [side.detach().double()[:, :shared] / temperature for side in (student, teacher)]
    time = torch.tensor([0.2, 0.55, 0.9, 0.2, 0.55], dtype=torch.float64)
    share = {
        "both": trained("cosine", 37) * (1 - time),
        "training_only": torch.full_like(time, trained("cosine", 37)),
        "timestep_only": 0.9 * (1 - time),
    }[axes][:, None]
    target = ((1 - share) * scaled[0] + share * scaled[1]).softmax(-1)
    likely = scaled[0].softmax(-1)
    expected = temperature**2 * (target * (target.clamp_min(1e-8).log() - likely.log())).sum(-1)
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=2e-6)
    values.sum().backward()
    grad = torch.zeros_like(student, dtype=torch.float64)
    grad[:, :shared] = temperature * (likely - target)
    torch.testing.assert_close(student.grad.double(), grad, atol=1e-6, rtol=1e-5)


def test_share_one_is_forward_kl_and_share_zero_asks_for_nothing():
    student, teacher = pair()
    rows, clock = rows_for(student), Clock(step=1, total_steps=2)
    whole = Tidal(teacher="t", axes="training_only", initial=1.0, maximum=1.0)
    kl = loss_values(Kl(teacher="t"), student, teacher, rows, clock)
    torch.testing.assert_close(loss_values(whole, student, teacher, rows, clock), kl, atol=1e-5, rtol=1e-5)
    none = Tidal(teacher="t", axes="training_only", initial=0.0, maximum=0.0)
    values = loss_values(none, student, teacher, rows, clock)
    values.sum().backward()
    assert values.abs().max() < 1e-5
    assert student.grad.abs().max() < 1e-6


def test_tiny_targets_are_clamped_inside_the_logarithm():
    """A target of 1e-11 contributes r * log 1e-8, not r * log r; the other contributes 0 in fp32."""
    student = torch.tensor([[0.0, -25.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -25.0]])
    loss = Tidal(teacher="t", temperature=1.0, axes="training_only", initial=0.5, maximum=0.5)
    values = loss_values(loss, student, teacher, rows_for(student), Clock())
    target = math.exp(-25.0)
    assert values.item() == pytest.approx(target * (math.log(1e-8) + 25.0), rel=1e-4, abs=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axes", "time"),
        ("growth", "sine"),
        ("initial", -0.1),
        ("maximum", 1.5),
        ("timestep_weight", "scheduler"),
    ],
)
def test_wrong_options_are_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        Tidal(teacher="t", **{field: value})
