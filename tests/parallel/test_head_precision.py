"""The gradient of bf16 hidden rows under a head over four ranks is that of one rank, rounded once.

All rows of the head's weight have a large part in common. It cancels in the gradient of a hidden row, because
a softmax's derivatives add up to nothing, but only over ALL ranks: each rank's share is large.
"""

import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.clock import Clock
from tide_megatron.head import work
from tide_megatron.head.fused import fused_head_loss
from tide_megatron.head.parts import HeadInput
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.rows import Rows
from tide_megatron.parallel.exchange import gather_rows

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


def gradient(hidden, weight, rows, **where):
    """Return the fused head loss's objective for one term of which nothing is left out."""
    start = where.pop("start", 0)
    student = HeadInput(
        hidden=hidden, weight=weight, start=start, vocabulary=IDS, gradient=torch.zeros(weight.shape)
    )
    losses, counts = {"ce": CrossEntropy()}, {"ce": torch.ones(())}
    return fused_head_loss(student, {}, losses, rows, counts, Clock(total_steps=1), **where).objective


def over_ranks():
    hidden, weight, rows = given()
    rank, width = dist.get_rank(), IDS // len(SIZES)
    own = torch.split(hidden, list(SIZES))[rank].clone().requires_grad_()
    gathered = gather_rows(own, SIZES, dist.group.WORLD)
    mine = weight[rank * width : (rank + 1) * width]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "product", as_on_cuda)
        where = {"group": dist.group.WORLD, "own": (rank, rank + 1), "start": rank * width}
        gradient(gathered, mine, rows, **where).backward()
    return own.grad


def test_shares_of_four_ranks_are_rounded_once(pool, monkeypatch):
    hidden, weight, rows = given()
    monkeypatch.setattr(work, "product", as_on_cuda)
    exact = hidden.float().requires_grad_()
    gradient(exact, weight, rows).backward()
    found = torch.cat(pool(4).run(over_ranks))
    assert found.dtype is torch.bfloat16
    error, once = (found.float() - exact.grad).abs(), 2**-8 * exact.grad.abs()
    assert (error <= once + 1e-3).all(), f"{float((error - once).max())} beyond one rounding"
