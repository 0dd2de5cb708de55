"""Exchanges of uneven rows: values, adjoints, padding, and the ledger against what torch.distributed had."""

import pytest
import torch
import torch.distributed as dist

from tide_megatron.parallel.collectives import Traffic
from tide_megatron.parallel.exchange import (
    COMM_STATS,
    broadcast_rows,
    gather_parts,
    gather_rows,
    gather_statistics,
    padded,
)

WIDTH = 3
SIZES = {
    "uneven": (5, 0, 17, 2),
    "one rank has all": (0, 0, 9, 0),
    "even": (8, 8, 8, 8),
    "nobody has any": (0, 0, 0, 0),
}


def part_of(rank, size):
    return torch.arange(size * WIDTH, dtype=torch.float32).view(size, WIDTH) + 100 * rank


def gathered(sizes):
    """Gather this rank's part, and send back a gradient that differs by rank."""
    sizes = sizes[: dist.get_world_size()]
    rank = dist.get_rank()
    COMM_STATS.take()
    rows = part_of(rank, sizes[rank]).requires_grad_()
    with Traffic() as traffic:
        whole = gather_rows(rows, sizes, dist.group.WORLD)
        there = traffic.bytes["allgather_base"] + traffic.bytes["allgather_into_tensor_out"]
        (whole * (rank + 1) * torch.arange(1.0, len(whole) + 1)[:, None]).sum().backward()
    plain = gather_parts(part_of(rank, sizes[rank]), sizes, dist.group.WORLD, "collect")
    return whole.detach(), rows.grad, COMM_STATS.take(), plain, dict(traffic.bytes), there


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_and_gradients_find_their_owners(pool, name, ranks):
    sizes = SIZES[name][:ranks]
    wanted = torch.cat([part_of(rank, size) for rank, size in enumerate(sizes)])
    factor = sum(range(1, ranks + 1))  # every rank's gradient of a row, added up
    first = 0
    for rank, (whole, gradient, _, plain, _, _) in enumerate(pool(ranks).run(gathered, SIZES[name])):
        if sum(sizes):
            assert torch.equal(whole, wanted)
            assert torch.equal(plain, wanted)
        mine = torch.arange(first + 1.0, first + sizes[rank] + 1)[:, None].expand(-1, WIDTH) * factor
        assert torch.equal(gradient, mine)
        first += sizes[rank]


@pytest.mark.parametrize("name", SIZES)
def test_the_ledger_has_what_arrived(pool, name):
    longest = padded(max(SIZES[name]))
    moved = 3 * longest * WIDTH * 4 if sum(SIZES[name]) else 0
    for *_, ledger, _, traffic, _ in pool(4).run(gathered, SIZES[name]):
        assert (ledger["rows"], ledger["gradients"], ledger["collect"]) == (moved, moved, moved)
        assert ledger["deliver"] == ledger["statistics"] == 0
        # What torch.distributed was handed: one part there, four parts back.
        assert sum(traffic.values()) == (5 * longest * WIDTH * 4 if moved else 0)


def shares_that_cancel(rank, rows):
    """Return one rank's share of the rows' gradients: a thousand times their sum over four ranks, fp32."""
    draw = torch.Generator().manual_seed(7)
    large, small = torch.randn(2, 4, rows, WIDTH, generator=draw, dtype=torch.float64)
    large[3] = -large[:3].sum(0)
    return (1000 * large + small)[rank].float()


def gathered_in_bf16(sizes):
    rank = dist.get_rank()
    rows = part_of(rank, sizes[rank]).bfloat16().requires_grad_()
    whole = gather_rows(rows, sizes, dist.group.WORLD)
    whole.backward(shares_that_cancel(rank, len(whole)))
    return whole.detach(), rows.grad


def test_gradients_of_bf16_rows_are_summed_in_fp32_and_rounded_once(pool):
    sizes = SIZES["uneven"]
    exact = sum(shares_that_cancel(rank, sum(sizes)).double() for rank in range(4))
    wanted = torch.split(exact, list(sizes))
    for rank, (whole, gradient) in enumerate(pool(4).run(gathered_in_bf16, sizes)):
        assert torch.equal(whole, torch.cat([part_of(r, size).bfloat16() for r, size in enumerate(sizes)]))
        assert gradient.dtype is torch.bfloat16
        once = 2**-8 * wanted[rank].abs() + 1e-3  # of one rounding to bf16, and of fp32 sums of thousands
        assert ((gradient.double() - wanted[rank]).abs() <= once).all()


def statistics(numbers):
    packed = (torch.arange(float(numbers)) + dist.get_rank()).requires_grad_()
    COMM_STATS.take()
    table = gather_statistics(packed, dist.group.WORLD)
    (table * (dist.get_rank() + 1)).sum().backward()
    return table.detach(), packed.grad, COMM_STATS.take()["statistics"]


@pytest.mark.parametrize("numbers", [0, 5, 16])
def test_statistics_come_back_summed(pool, numbers):
    for table, gradient, moved in pool(4).run(statistics, numbers):
        assert torch.equal(table, torch.arange(float(numbers)) + torch.arange(4.0)[:, None])
        assert torch.equal(gradient, torch.full((numbers,), 10.0))
        assert moved == 2 * 3 * padded(numbers) * 4


def broadcasts(source):
    rows = part_of(dist.get_rank(), 2)
    COMM_STATS.take()
    return broadcast_rows(rows, source, dist.group.WORLD), COMM_STATS.take()["deliver"]


def test_a_broadcast_counts_where_it_arrives(pool):
    for rank, (rows, moved) in enumerate(pool(4).run(broadcasts, 2)):
        assert torch.equal(rows, part_of(2, 2))
        assert moved == (0 if rank == 2 else 2 * WIDTH * 4)


def alone():
    rows = part_of(0, 2).requires_grad_()
    COMM_STATS.take()
    whole = gather_rows(rows, (2,), None)
    table = gather_statistics(rows.flatten(), None)
    return whole is rows, table.shape, sum(COMM_STATS.take().values())


def test_one_rank_sends_nothing(pool):
    assert pool(1).run(alone) == [(True, (1, 6), 0)]
