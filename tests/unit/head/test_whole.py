"""Passes over whole slabs are the tiles' passes: values, gradients, in place; and each becomes one kernel.

Most tests run the passes as they are, uncompiled: the same functions, without a compiler's minutes.
"""

import pytest
import torch

from tests.parallel.vocabulary_cases import CASES, CLOCK, counts_of, heads_of, hidden_of, losses_of, noised_of
from tide_megatron.head.compiler import PassCompiler
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss, HeadOptions
from tide_megatron.head.tiles import CPU_TILE, TILES_ALIVE
from tide_megatron.losses import LOSSES
from tide_megatron.losses.rows import rows_of

FIXED = TILES_ALIVE * 4 * CPU_TILE


@pytest.fixture
def uncompiled(monkeypatch):
    """Call the passes as they are; return the names of those that were called."""
    called = []

    def run(self, function, options, *inputs):
        called.append(function.__name__)
        return function(*options, *inputs)

    monkeypatch.setattr(PassCompiler, "run", run)
    return called


def both_ways(case, name, slab_rows, dtype=torch.float32, evaluates=False):
    """Return (sums, hidden gradient, weight gradient) by tiles and by whole slabs."""
    noised = noised_of(case, 0, 2)
    heads, hidden = heads_of(case), hidden_of(case, noised, 0)
    losses, rows = losses_of(name, case), rows_of(noised)
    counts = {key: float(count) for key, count in counts_of(losses, [noised]).items()}
    budget = FIXED + slab_rows * 4 * sum(len(head) for head in heads.values())
    found = []
    for compiled in (False, True):
        mine = hidden["student"].to(dtype).requires_grad_(not evaluates)
        gradient = None if evaluates else torch.zeros_like(heads["student"])
        student = HeadInput(hidden=mine, weight=heads["student"].to(dtype), gradient=gradient)
        answers = {
            key: HeadInput(hidden=hidden[key].to(dtype), weight=heads[key].to(dtype))
            for key in ("same", "other")
        }
        head = HeadLoss(losses, options=HeadOptions(compiled=compiled), budget_bytes=budget)
        result = head(student, answers, GatheredRows.alone(rows, counts), CLOCK)
        if not evaluates:
            result.objective.backward()
        found.append((result.sums, mine.grad, gradient))
    return found


def check_alike(tiled, whole, rtol=2e-6):
    sums, *gradients = whole
    for name, value in tiled[0].items():
        assert float(sums[name]) == pytest.approx(float(value), rel=rtol, abs=1e-7), name
    for mine, wanted in zip(gradients, tiled[1:], strict=True):
        if wanted is not None and wanted.numel():
            assert (mine - wanted).abs().max() <= rtol * wanted.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("slab_rows", [1000, 5, 1])
@pytest.mark.parametrize("case", CASES)
def test_all_losses_together(uncompiled, case, slab_rows):
    tolerance = 4e-5 if case == "large logits" else 5e-6
    check_alike(*both_ways(CASES[case], "all", slab_rows), rtol=tolerance)
    assert set(uncompiled) == (set() if case == "no rows" else {"statistics", "row_sums", "slopes"})


@pytest.mark.parametrize("case", ["one vocabulary", "three vocabularies"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone(uncompiled, name, case):
    check_alike(*both_ways(CASES[case], name, 1000), rtol=5e-6)
