"""The collectives of our own on four ranks, over the world and over half of it."""

import pytest
import torch
import torch.distributed as dist

from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.parallel.collectives import (
    Traffic,
    all_agree,
    barrier,
    broadcast_object,
    fail_together,
    gather_objects,
    is_first,
    sum_over,
)
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout


def speak():
    """Use each collective over the world and over pairs 01, 23."""
    rank, pair = dist.get_rank(), make_groups(Layout(tensor=2)).tp
    value = torch.tensor([1.0, rank])
    barrier()
    barrier(pair)
    summed = sum_over(value)
    return {
        "first": is_first(),
        "sum": value.tolist(),
        "in place": summed is value,
        "pair sum": sum_over(torch.tensor(rank), pair).item(),
        "agree": [all_agree(True), all_agree(rank != 2), all_agree(rank != 2, pair), all_agree(False)],
        "gather": gather_objects({"rank": rank}),
        "pair gather": gather_objects(rank, pair),
        "broadcast": broadcast_object("zero" if rank == 0 else None),
        "pair broadcast": broadcast_object(rank, pair),
    }


def test_each_collective_over_the_world_and_over_pairs(pool):
    for rank, said in enumerate(pool(4).run(speak)):
        first = rank // 2 * 2
        assert said == {
            "first": rank == 0,
            "sum": [4.0, 6.0],
            "in place": True,
            "pair sum": 2 * first + 1,
            "agree": [True, False, first == 0, False],
            "gather": [{"rank": other} for other in range(4)],
            "pair gather": [first, first + 1],
            "broadcast": "zero",
            "pair broadcast": first,
        }


def test_a_process_alone_needs_no_world(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test may have left one
    assert is_first()
    barrier()
    assert sum_over(torch.tensor(3)).item() == 3
    assert all_agree(True)
    assert not all_agree(False)
    assert gather_objects("a") == ["a"]
    assert broadcast_object("a") == "a"
    with pytest.raises(DataError, match="cut"), fail_together():
        raise DataError("cut")


def fail_on(faults):
    """Return what this rank sees when the ranks in `faults` raise."""
    try:
        with fail_together():
            fault = faults.get(dist.get_rank())
            if fault is not None:
                raise fault
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_one_ranks_fault_is_everybodys(pool):
    assert pool(4).run(fail_on, {}) == [None] * 4
    assert pool(4).run(fail_on, {2: DataError("file cut")}) == [("DataError", "file cut")] * 4
    two = {3: DataError("file cut"), 1: ConfigError("bad key")}
    assert pool(4).run(fail_on, two) == [("ConfigError", "bad key")] * 4
    seen = pool(4).run(fail_on, {1: ValueError("ours")})
    assert seen[1] == ("ValueError", "ours")
    assert [seen[rank] for rank in (0, 2, 3)] == [("RuntimeError", "rank 1 failed: ValueError: ours")] * 3


def count_traffic():
    ours = torch.zeros(6, dtype=torch.float32)
    sum_over(ours)
    with Traffic() as traffic:
        sum_over(ours)
        sum_over(ours.bfloat16())
        gathered = [torch.empty(3) for _ in range(2)]
        dist.all_gather(gathered, ours[:3])
        dist.all_to_all_single(torch.empty(4), ours[:4])
        dist.monitored_barrier()
        _ = ours * 2
    sum_over(ours)
    return dict(traffic.bytes), dict(traffic.calls)


def test_traffic_counts_what_is_handed_over_inside_the_block(pool):
    # Sums of 6 numbers in 4 and 2 bytes; a gather of 3, an exchange of 4 numbers of 4 bytes; one of nothing.
    expected = (
        {"allreduce": 36, "allgather": 12, "alltoall_base": 16, "monitored_barrier": 0},
        {"allreduce": 2, "allgather": 1, "alltoall_base": 1, "monitored_barrier": 1},
    )
    assert pool(2).run(count_traffic) == [expected] * 2
