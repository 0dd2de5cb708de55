"""The gradient of bf16 hidden rows under a head over four ranks is that of one rank, rounded once.

All rows of the head's weight have a large part in common. It cancels in the gradient of a hidden row, because
a softmax's derivatives add up to nothing, but only over ALL ranks: each rank's share is large.
"""

import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.clock import Clock
from tide_megatron.head import tile_passes
from tide_megatron.head.gather import GatheredRows
from tide_megatron.head.inputs import HeadInput
from tide_megatron.head.loss import HeadLoss
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.vocab_group import VocabGroup

SIZES, IDS, WIDTH = (5, 0, 9, 2), 512, 16


def as_on_cuda(left, right):
    """Multiply as a GPU does: bf16 factors, fp32 sums, handed out in fp32."""
    return left.float() @ right.float()


def given():
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(sum(SIZES), WIDTH, generator=draw).bfloat16()
    weight = (8 + torch.randn(IDS, WIDTH, generator=draw) / 8).bfloat16()
    gold = torch.randint(IDS, (len(hidden),), generator=draw)
    sample = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    return hidden, weight, Rows(gold=gold, sample=sample, time=torch.ones(len(SIZES)), maskable=sample)


def objective(hidden, weight, rows, group, own):
    """Return the head loss's objective for one term of which nothing is left out."""
    student = HeadInput(hidden=hidden, weight=weight, gradient=torch.zeros(weight.shape))
    gathered = GatheredRows(rows=rows, sizes=SIZES, own=own, counts={"ce": 1.0})
    return HeadLoss({"ce": CrossEntropy()}, group)(student, {}, gathered, Clock(total_steps=1)).objective


def over_ranks():
    hidden, weight, rows = given()
    rank = dist.get_rank()
    own = torch.split(hidden, list(SIZES))[rank].clone().requires_grad_()
    group = VocabGroup.of([IDS], len(SIZES), rank, dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_passes, "product", as_on_cuda)
        objective(own, weight, rows, group, slice(rank, rank + 1)).backward()
    return own.grad


def test_shares_of_four_ranks_are_rounded_once(pool, monkeypatch):
    hidden, weight, rows = given()
    monkeypatch.setattr(tile_passes, "product", as_on_cuda)
    exact = hidden.float().requires_grad_()
    objective(exact, weight, rows, VocabGroup(), slice(0, len(SIZES))).backward()
    found = torch.cat(pool(4).run(over_ranks))
    assert found.dtype is torch.bfloat16
    error, once = (found.float() - exact.grad).abs(), 2**-8 * exact.grad.abs()
    assert (error <= once + 1e-3).all(), f"{float((error - once).max())} beyond one rounding"
