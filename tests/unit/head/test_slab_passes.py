"""Passes over whole slabs are the tiles' passes: values, gradients, in place; and each becomes one kernel.

Most tests run the passes as they are, uncompiled: the same functions, without a compiler's minutes.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench import head_bytes
from tests.parallel.vocabulary_cases import CASES, CLOCK, counts_of, heads_of, hidden_of, losses_of, noised_of
from tests.unit.head.calls import Uncompiled
from tide_megatron.head import slab_passes
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss, HeadOptions
from tide_megatron.head.passes import TermRows, TermSlopes, slopes
from tide_megatron.head.tiles import CPU_TILE, TILES_ALIVE
from tide_megatron.losses import LOSSES
from tide_megatron.losses.base import ColumnLoss
from tide_megatron.losses.rows import rows_of

FIXED = TILES_ALIVE * 4 * CPU_TILE


def both_ways(case, name, slab_rows, dtype=torch.float32, evaluates=False):
    """Return (sums, hidden gradient, weight gradient) by tiles and by whole slabs, and the passes called."""
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
        head.compiler = passes = Uncompiled()
        result = head(student, answers, GatheredRows.alone(rows, counts), CLOCK)
        if not evaluates:
            result.objective.backward()
        found.append((result.sums, mine.grad, gradient))
    return *found, passes.called


def check_alike(tiled, whole, rtol=2e-6):
    sums, *gradients = whole
    for name, value in tiled[0].items():
        assert float(sums[name]) == pytest.approx(float(value), rel=rtol, abs=1e-7), name
    for mine, wanted in zip(gradients, tiled[1:], strict=True):
        if wanted is not None and wanted.numel():
            assert (mine - wanted).abs().max() <= rtol * wanted.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize(
    ("case", "slab_rows"),
    [*((case, 1000) for case in CASES), ("three vocabularies", 5), ("few shared ids", 1)],
)
def test_all_losses_together(case, slab_rows):
    tolerance = 4e-5 if case == "large logits" else 5e-6
    tiled, mine, called = both_ways(CASES[case], "all", slab_rows)
    check_alike(tiled, mine, rtol=tolerance)
    assert called == (set() if case == "no rows" else {"statistics", "row_sums", "slopes"})


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone(name):
    check_alike(*both_ways(CASES["three vocabularies"], name, 1000)[:2], rtol=5e-6)


def test_bf16_heads():
    """Derivatives are rounded to bf16 in both ways, a tile's product once more by tiles."""
    tiled, mine, _ = both_ways(CASES["one vocabulary"], "all", 1000, torch.bfloat16)
    check_alike(tiled[:1], mine[:1], rtol=5e-6)
    for found, wanted in zip(mine[1:], tiled[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["all", "jensen_shannon", "calm"])
def test_evaluation(name):
    tiled, mine, called = both_ways(CASES["few shared ids"], name, 5, evaluates=True)
    check_alike(tiled, mine, rtol=5e-6)
    assert "row_sums" not in called, "only a derivative asks for a row's sum"


def test_a_certain_teacher_and_ids_that_are_not_compared_leave_no_trace():
    """An excluded id adds nothing, whatever stands there; logits of padding may be anything."""
    draw = torch.Generator().manual_seed(3)
    logits = [torch.randn(4, 1, 64, generator=draw) * 9 for _ in range(2)]
    logits[1][0, 0, 5] = 200.0
    for kind in [kind for kind in LOSSES.values() if issubclass(kind, ColumnLoss)]:
        loss = kind(teacher="t")
        found = []
        for compared, junk in ((64, 0.0), (40, torch.nan), (40, 7.0)):
            ours, theirs = (part.clone() for part in logits)
            ours[..., compared:], theirs[..., compared:] = junk, junk
            if compared == 64:
                ours[..., 40:], theirs[..., 40:] = -1e6, -1e6
            share = torch.full((4,), 0.3)
            rows = TermRows(torch.tensor(compared), None, share)
            softened = loss.soften(logits[0][..., :40], logits[1][..., :40], share[:, None, None])
            merged = [(part.amax((1, 2)), (part.logsumexp((1, 2)) - part.amax((1, 2)))) for part in softened]
            known = TermSlopes(rows, merged[0], merged[1], torch.full((4,), 0.1), torch.ones(4))
            (values,) = slopes(((loss, 1),), True, [ours, theirs], None, [known])
            found.append((values, ours[..., :40], ours[..., compared:]))
        for values, derivative, outside in found[1:]:
            torch.testing.assert_close(values, found[0][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(derivative, found[0][1], rtol=1e-5, atol=1e-6)
            assert not outside.any(), kind


def largest_new_array(compiler):
    """Return the numbers of the largest array that operations make in a call, over those of a slab."""
    losses = head_bytes.CASES["cross_entropy + tidal + reverse_calm, two teachers"]
    work = head_bytes.call(losses, compiler)
    work()
    with head_bytes.Operations(head_bytes.Moved()) as seen:
        work()
    return seen.largest / (head_bytes.ROWS * head_bytes.IDS)


class Silent(Uncompiled):
    """Passes whose temporaries are not seen."""

    def run(self, function, options, *inputs):
        with _disable_current_modes():
            return super().run(function, options, *inputs)


def test_nothing_of_a_slabs_size_is_made_beside_its_logits(monkeypatch):
    monkeypatch.setattr(head_bytes, "ROWS", 64)
    assert largest_new_array(None) <= 1 / 4, "a tile"
    assert largest_new_array(Silent()) <= 1 / 16, "numbers a row"
    real = slab_passes.gold_logits
    copied = lambda columns, gold: real(dataclasses.replace(columns, logits=columns.logits * 1), gold)  # noqa: E731
    monkeypatch.setattr(slab_passes, "gold_logits", copied)
    assert largest_new_array(Silent()) == 1, "a planted copy is seen"


@pytest.mark.slow
def test_each_pass_is_one_kernel_that_reads_every_logit_once_and_leaves_nothing_behind(monkeypatch):
    """By the code that Inductor writes for an H100; a pass over blocks too large for that keeps a slab."""
    found = head_bytes.count(head_bytes.CASES["cross_entropy + tidal"], compiled=True)
    slab = head_bytes.ROWS * head_bytes.IDS * 2
    assert (found.kernels, found.reads, found.writes, found.allocated) == (2, 4 * slab, slab, 0)
    assert found.bytes == 5 * slab, "what runs between the kernels touches no logits"
    found = head_bytes.count(head_bytes.CASES["jensen_shannon"], compiled=True)
    assert (found.reads, found.writes, found.allocated) == (6 * slab, slab, 0), "one reading more"
    monkeypatch.setattr(slab_passes, "SLOPES_BLOCK", head_bytes.IDS)
    assert head_bytes.count(head_bytes.CASES["cross_entropy + tidal"], compiled=True).allocated == slab


@pytest.mark.parametrize("kind", [kind for kind in LOSSES.values() if issubclass(kind, ColumnLoss)])
def test_a_row_without_a_pair_gets_no_derivative_however_large_its_logits(kind):
    ours, theirs = torch.full((2, 2, 1, 64), 400.0)  # exp(400 / T) is infinite
    nothing = torch.zeros(2)
    rows = TermRows(torch.tensor(64), nothing.long(), nothing)
    known = TermSlopes(rows, (nothing, nothing), (nothing, nothing), nothing, nothing)
    slopes(((kind(teacher="t"), 1),), True, [ours, theirs], None, [known])
    assert not ours.any()
