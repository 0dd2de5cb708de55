"""The pool itself: results in rank order, faults with their rank, an end to hangs, and a fresh start."""

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import Pool, RankFailure


def add_ranks(start):
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def process_id():
    return os.getpid()


def start_a_child():
    return subprocess.Popen(["sleep", "600"]).pid


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)


def hang_on(rank):
    while dist.get_rank() == rank:
        time.sleep(0.1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_rank_order(pool, world):
    total = 10 * world + sum(range(world))
    assert pool(world).run(add_ranks, 10) == [(rank, total, 1) for rank in range(world)]


def test_a_pool_is_reused(pool):
    assert pool(2).run(process_id) == pool(2).run(process_id)


def test_faults_name_their_rank_and_the_pool_recovers(pool):
    with pytest.raises(
        RankFailure, match=r"(?s)rank 1 failed:.*ValueError: planted.*ranks \[0\] did not answer"
    ):
        pool(2).run(fail_on, 1)
    with pytest.raises(RankFailure, match=r"rank 0 failed:\nthe process died, exit code 3"):
        pool(1).run(die_on, 0)
    with pytest.raises(RankFailure, match=r"ranks \[0\] did not answer within 1 s"):
        pool(1).run(hang_on, 0, timeout_seconds=1.0)
    assert [total for _, total, _ in pool(2).run(add_ranks, 0)] == [1, 1]


def is_running(process_id):
    """Say whether it runs; an ended process that nobody has waited for does not."""
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_left_behind():
    pool = Pool(1)
    left = pool.run(start_a_child) + pool.run(process_id)
    assert all(map(is_running, left))
    pool.close()
    deadline = time.monotonic() + 10.0
    while any(map(is_running, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, left))
