"""Schedules: ends, derivative, weight and the sampler's ratio, against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from tide_megatron.diffusion.schedule import SCHEDULES, Cosine, Linear

GRID = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_everything_is_visible_at_the_start_and_hidden_at_the_end(name):
    ends = SCHEDULES[name].alpha(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivative_is_that_of_alpha(name):
    time = GRID.clone().requires_grad_(True)
    SCHEDULES[name].alpha(time).sum().backward()
    torch.testing.assert_close(SCHEDULES[name].d_alpha(GRID), time.grad)


def test_weight_is_one_over_t_for_linear():
    torch.testing.assert_close(Linear().weight(GRID), 1 / (GRID + 1e-6))


def test_weight_of_cosine():
    angle = math.pi / 2 * (1 - GRID)
    torch.testing.assert_close(Cosine().weight(GRID), math.pi / 2 * angle.sin() / (angle.cos() + 1e-6))


def test_weight_is_finite_at_time_zero():
    assert Linear().weight(torch.tensor([0.0])).item() == pytest.approx(1e6)


def test_stay_hidden_is_the_ratio_of_hiding_probabilities():
    torch.testing.assert_close(Linear().stay_masked(GRID / 3, GRID), torch.full_like(GRID, 1 / 3))
    later = Cosine().stay_masked(GRID / 3, GRID)
    expected = torch.cos(math.pi / 2 * (1 - GRID / 3)) / torch.cos(math.pi / 2 * (1 - GRID))
    torch.testing.assert_close(later, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_arithmetic_stays_in_fp32(name):
    schedule, time = SCHEDULES[name], torch.tensor([0.25])
    for value in (schedule.alpha(time), schedule.d_alpha(time), schedule.weight(time)):
        assert value.dtype == torch.float32
