"""Where a step's time is booked, and what it is held against, whatever the layout."""

import dataclasses
import time

import pytest
import torch.distributed as dist

from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.base.memory import peak_memory_bytes
from tide_megatron.base.phases import Phases
from tide_megatron.parallel.layout import DataShard
from tide_megatron.teachers import teacher as module
from tide_megatron.teachers.exchange import Route
from tide_megatron.teachers.teacher import Teacher
from tide_megatron.train.counts import count
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import Run, train_step

DELAY = 0.3
"""Seconds that every collect and every deliver takes longer here: far more than the step takes itself."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair_run(tmp_path_factory.mktemp("pair"))


def slow_step(file, folder):
    """Step once with slow exchanges; return seconds by phase, and how many exchanges were slow."""
    recipe, _ = load_recipe(file, [f"folder={folder}", *PAIR_ON_FOUR])
    parts = set_up(recipe, choose_device("cpu"))
    slept = []

    def slow(function):
        def wrapped(*arguments):
            slept.append(time.sleep(DELAY))
            return function(*arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gather_views", slow(module.gather_views))
        patch.setattr(Route, "gather_hidden", slow(Route.gather_hidden))
        parts.run.phases.take()
        train_step(parts.run, parts.run.read(parts.loader.update(0)), Clock(total_steps=4))
    return parts.run.phases.take(), len(slept)


def test_collect_and_deliver_are_exchange_and_not_teacher(pool, pair, tmp_path):
    for seconds, slept in pool(4).run(slow_step, pair, tmp_path):
        assert slept == 7, (
            "one collect and two deliveries of `dense`, two each of the teachers that sit alone"
        )
        assert seconds["exchange"] >= slept * DELAY


def two_timers(file, folder):
    """Give a run's teachers another timer than the run's; return what the run says."""
    recipe, _ = load_recipe(file, [f"folder={folder}"])
    run = set_up(recipe, choose_device("cpu")).run
    found = run.teachers["moe"]
    with pytest.raises(AssertionError) as caught:
        Run(**vars(run) | {"teachers": {"moe": Teacher("moe", found.model, found.view_builder, found.route)}})
    return str(caught.value), isinstance(found.phases, Phases)


def test_a_run_refuses_teachers_that_book_their_time_elsewhere(pool, pair, tmp_path):
    ((message, _),) = pool(1).run(two_timers, pair, tmp_path)
    assert message.startswith("['moe'] book their time elsewhere than the run")


def step_cost(file, folder, words):
    """Step once; return what it needed and held before over all ranks, and what this rank has held since."""
    recipe, _ = load_recipe(file, [f"folder={folder}", *words])
    parts = set_up(recipe, choose_device("cpu"))
    result = train_step(parts.run, parts.run.read(parts.loader.update(0)), Clock(total_steps=4))
    return result.cost, peak_memory_bytes()


def test_what_a_step_needs_is_the_same_on_any_ranks_layouts_and_padding(pool, pair, tmp_path):
    ((wanted, _),) = pool(1).run(step_cost, pair, tmp_path, ["batch.samples=8"])
    assert wanted.flops > 1e8
    ways = {1: ["batch.samples=8", "data.fixed_length=160"], 4: PAIR_ON_FOUR}
    for ranks, words in ways.items():
        found = pool(ranks).run(step_cost, pair, tmp_path, words)
        assert [cost.flops for cost, _ in found] == [wanted.flops] * ranks
    told, own = zip(*((cost.peak_memory_bytes, memory) for cost, memory in found), strict=True)
    assert len(set(told)) == 1
    assert max(own) * 0.5 < told[0] <= max(own), "the largest of all ranks, as it was before the step"


def test_two_forwards_of_complementary_views_need_no_more_than_one(pool, pair, tmp_path):
    one, two = (
        pool(1).run(step_cost, pair, tmp_path, ["batch.samples=8", *words])[0][0].flops
        for words in ([], ["teachers.moe.forwards=two", "teachers.own.forwards=two"])
    )
    assert one == two


def counted_twice(file, folder):
    """Count one microbatch that both ranks read, once as one replica's and once as two replicas'."""
    recipe, _ = load_recipe(file, [f"folder={folder}", "student.layout.expert=1"])
    parts = set_up(recipe, choose_device("cpu"))
    given = parts.run.read(dataclasses.replace(parts.loader, shard=DataShard()).update(0))
    given = dataclasses.replace(given, numbers={**given.numbers, "flops": [1.5]})
    mine = dict(zip(parts.run.head.losses, given.numbers["divisors"], strict=True))
    shards = DataShard(), DataShard(rank=dist.get_rank(), size=2)
    return (
        mine,
        len(given.rows[0].gold),
        [count(given, parts.run.head, shard, 1.0) for shard in shards],
    )


def test_ranks_of_one_replica_count_their_samples_once_and_their_work_each(pool, pair, tmp_path):
    for mine, masked, (one, two) in pool(2).run(counted_twice, pair, tmp_path):
        assert (one.divisors, one.masked) == (mine, masked)
        assert (two.divisors, two.masked) == ({term: 2 * size for term, size in mine.items()}, 2 * masked)
        assert two.tokens == 2 * one.tokens > 0
        assert one.cost.flops == two.cost.flops == 3.0
