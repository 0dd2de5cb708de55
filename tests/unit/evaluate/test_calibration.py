"""Calibration errors and fitted temperatures, against models whose truth is known."""

import pytest
import torch

from tide_megatron.evaluate.calibration import BINS, TEMPERATURES, Calibration

ROWS, SAMPLES, VOCABULARY = 40_000, 50, 8


def calibrated(overconfidence):
    """Draw gold tokens from a distribution, and let a model claim its logits times `overconfidence`."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * 1.5
    gold = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    claimed = logits * overconfidence
    nll = torch.stack(
        [torch.nn.functional.cross_entropy(claimed / one, gold, reduction="none") for one in TEMPERATURES]
    )
    confidence, answer = claimed.softmax(-1).max(-1)
    found = Calibration.empty(SAMPLES, torch.device("cpu"))
    for part in torch.arange(ROWS).split(ROWS // 3):  # microbatch by microbatch
        found.add(part % SAMPLES, nll[:, part], confidence[part], (answer == gold)[part])
    return found, nll, confidence, answer == gold


@pytest.mark.parametrize("overconfidence", [0.5, 2**-0.5, 1.0, 2**0.5, 2.0])
def test_the_fitted_temperature_undoes_a_wrong_one(overconfidence):
    found, nll, _, _ = calibrated(overconfidence)
    assert found.temperature == pytest.approx(overconfidence)
    best = nll[TEMPERATURES.index(found.temperature)].double().sum()
    assert float(found.tempered_nll().sum()) == pytest.approx(float(best))
    assert (found.expected_error < 0.01) == (overconfidence == 1.0)


def test_the_error_is_the_mean_gap_of_confidence_and_accuracy_over_bins():
    found, _, confidence, is_right = calibrated(2.0)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [
        abs(float((confidence[place == one] - is_right[place == one].float()).sum())) for one in range(BINS)
    ]
    assert found.expected_error == pytest.approx(sum(gaps) / ROWS, rel=1e-4)


def test_a_half_of_the_samples_is_scored_at_the_temperature_of_the_other():
    """Even samples want 1/2 and odd ones 2: each half is judged by what the other wants."""
    found = Calibration.empty(4, torch.device("cpu"))
    found.nll[:] = 10.0
    found.nll[0, 0::2], found.nll[-1, 0::2] = 1.0, 5.0
    found.nll[-1, 1::2], found.nll[0, 1::2] = 2.0, 7.0
    assert found.tempered_nll().tolist() == [5.0, 7.0, 5.0, 7.0]


def test_a_certain_model_and_one_without_tokens():
    found = Calibration.empty(1, torch.device("cpu"))
    assert found.expected_error == 0.0
    found.add(
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(len(TEMPERATURES), 2),
        torch.ones(2),
        torch.tensor([True, False]),
    )
    assert found.expected_error == 0.5
