"""The figures of the precision bench, on logits of which they are known."""

from pathlib import Path

import pytest
import torch

from bench.precision import CHUNK, Case, chunks, figures

SAMPLE = torch.tensor([0] * 6 + [2] * 3)


def case():
    gold = torch.arange(9) % 5
    return Case(Path("model"), lambda model: None, gold, SAMPLE, None, None)


def test_what_did_not_move_has_figures_of_nothing():
    logits, student = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    found = figures(logits, logits + 3.0, student, case())  # a softmax does not see the shift
    assert all(abs(value) < 1e-6 for value in found.values()), found


def test_chunks_are_runs_of_one_sample():
    values = torch.arange(9.0)
    assert CHUNK == 4
    assert chunks(values, SAMPLE).tolist() == [0 + 1 + 2 + 3, 4 + 5, 6 + 7 + 8]


def test_a_known_change_is_told():
    exact = torch.zeros(9, 2)
    moved = torch.stack([torch.full((9,), 1.0), torch.zeros(9)], dim=1)
    gold = torch.zeros(9, dtype=torch.int64)
    asked = Case(Path("m"), lambda model: None, gold, SAMPLE, None, None)
    found = figures(exact + torch.tensor([0.0, 1e-3]), moved, exact, asked)
    p = 1 / (1 + torch.e**-1)
    assert found["top-1"] == 1.0
    assert found["likelihood"] == pytest.approx(torch.log(torch.tensor(p / 0.5)).item(), abs=2e-3)
    assert found["target"] == pytest.approx(1 / (1 + torch.e**-0.5) - 0.5, abs=1e-3)
