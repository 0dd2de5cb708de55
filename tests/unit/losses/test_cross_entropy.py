"""Cross-entropy: the bound's weights and the four divisors, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from goldens.dense import gold_log_likelihood, loss_values
from tide_megatron.base.clock import Clock
from tide_megatron.diffusion.batch import IGNORED, Batch, Noised
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import rows_of

CLOCK = Clock()


def example():
    """Three samples of five tokens with 4, 2 and 0 maskable ones, of which 2, 2 and 0 are masked."""
    ids = torch.arange(15).reshape(3, 5) % 7
    labels = ids.clone()
    labels[0, 0] = labels[1, :3] = labels[2] = IGNORED
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0, 2] = hidden[0, 4] = hidden[1, 3] = hidden[1, 4] = True
    batch = Batch(
        sample_ids=torch.arange(3), epochs=torch.zeros(3), ids=ids, labels=labels, reply_bytes=torch.ones(3)
    )
    return Noised(batch=batch, time=torch.tensor([0.5, 0.25, 0.9]), masked=hidden)


def logits_of(rows, vocabulary=7, seed=0):
    """Make fp32 logits with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator).mul(2).requires_grad_(True)


def test_gold_log_likelihood_by_hand():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [3.0, 3.0, 3.0]])
    values = gold_log_likelihood(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(values, torch.tensor([math.log(2 / 8), -math.log(3)]))
    whole = gold_log_likelihood(logits[None].expand(3, 2, 3), torch.tensor([[1, 2]]).expand(3, 2))
    torch.testing.assert_close(whole, values.expand(3, 2))


def test_gold_log_likelihood_is_fp32_for_bf16_logits():
    logits = logits_of(4).detach().bfloat16()
    values = gold_log_likelihood(logits, torch.tensor([0, 1, 2, 3]))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, gold_log_likelihood(logits.float(), torch.tensor([0, 1, 2, 3])))


def test_rows_of_lists_hidden_tokens_in_order():
    rows = rows_of(example())
    assert rows.gold.tolist() == [2, 4, 1, 2]
    assert rows.sample.tolist() == [0, 0, 1, 1]
    assert rows.maskable.tolist() == [4, 2, 0]
    assert rows.time[rows.sample].tolist() == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("normalization", "count"), [("token", 6), ("sequence", 3), ("batch", 3), ("hidden", 4)]
)
def test_counts(normalization, count):
    value = CrossEntropy(normalization=normalization).count(example())
    assert value.item() == count
    assert value.dtype == torch.float64
    assert value.shape == ()


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch", "hidden"])
@pytest.mark.parametrize("timestep_weight", ["scheduler", "uniform"])
def test_objective_is_the_weighted_mean_written_out(normalization, timestep_weight):
    noised = example()
    logits = logits_of(4)
    loss = CrossEntropy(normalization=normalization, timestep_weight=timestep_weight)
    rows = rows_of(noised)
    total = (
        loss.coefficients(rows, CLOCK) * loss_values(loss, logits, None, rows, CLOCK)
    ).sum() / loss.count(noised)
    nll = [-float(logits[row].double().log_softmax(-1)[gold]) for row, gold in enumerate((2, 4, 1, 2))]
    weight = [1 / (t + 1e-6) if timestep_weight == "scheduler" else 1.0 for t in (0.5, 0.5, 0.25, 0.25)]
    terms = [w * n for w, n in zip(weight, nll, strict=True)]
    expected = {
        "token": sum(terms) / 6,
        "sequence": sum(terms[:2]) / 4 / 3 + sum(terms[2:]) / 2 / 3,
        "batch": sum(terms) / 3,
        "hidden": sum(terms) / 4,
    }[normalization]
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_is_weight_times_p_minus_onehot():
    noised, logits = example(), logits_of(4)
    loss, rows = CrossEntropy(), rows_of(noised)
    (loss.coefficients(rows, CLOCK) * loss_values(loss, logits, None, rows, CLOCK)).sum().backward()
    onehot = torch.nn.functional.one_hot(rows.gold, 7)
    expected = (1 / (rows.time[rows.sample] + 1e-6))[:, None] * (logits.detach().softmax(-1) - onehot)
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=1e-6)


def test_cosine_schedule_brings_its_own_weight():
    rows = rows_of(example())
    angle = math.pi / 2 * (1 - rows.time[rows.sample])
    expected = math.pi / 2 * angle.sin() / (angle.cos() + 1e-6)
    torch.testing.assert_close(CrossEntropy(schedule="cosine").coefficients(rows, CLOCK), expected)


def test_hard_twin_is_the_mean_nll_of_hidden_tokens():
    noised, logits = example(), logits_of(4)
    twin, rows = CrossEntropy(timestep_weight="uniform", normalization="hidden"), rows_of(noised)
    values = loss_values(twin, logits, None, rows, CLOCK) * twin.coefficients(rows, CLOCK)
    expected = torch.nn.functional.cross_entropy(logits, rows.gold)
    torch.testing.assert_close(values.sum() / twin.count(noised).float(), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1),
        ("weight", float("inf")),
        ("timestep_weight", "none"),
        ("normalization", "tokens"),
        ("schedule", "sin"),
    ],
)
def test_wrong_options_are_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        CrossEntropy(**{field: value})
