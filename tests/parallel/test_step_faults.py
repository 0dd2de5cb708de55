"""What goes wrong inside a step: a teacher's NaN, other samples than the student's, a rank that dies.

Nothing hangs: a skipped step is skipped by all and names teacher and samples; a death ends all ranks with the
first error.
"""

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.tiny_run import PAIR_ON_FOUR, write_pair_run
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import RanksFailed, TideError
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.train.resolve import load_recipe
from tide_megatron.train.setup import set_up
from tide_megatron.train.step import train_step

DEAD_AFTER_SECONDS = 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair_run(tmp_path_factory.mktemp("pair"))


def prepared(file, folder, words=PAIR_ON_FOUR):
    recipe, _ = load_recipe(file, [f"folder={folder}", *words])
    return set_up(recipe, choose_device("cpu"))


def poison(model):
    """Make whatever this rank's final norm gives NaN."""
    with torch.no_grad():
        model.decoder.final_layernorm.weight.fill_(float("nan"))


def broken_step(file, folder, name, poisoned):
    """Step once with a teacher's norm spoilt on one rank; return what was said, own samples, what moved."""
    parts = prepared(file, folder)
    if dist.get_rank() == poisoned:
        poison(parts.run.teachers[name].model)
    batches = parts.loader.update(0)
    before = [parameter.detach().clone() for parameter in parts.run.student.model.parameters()]
    result = train_step(parts.run, parts.run.read(batches), Clock(total_steps=4))
    after = parts.run.student.model.parameters()
    moved = not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    mine = sorted(int(sample) for batch in batches for sample in batch.sample_ids)
    return result.update.applied, result.broken, mine, moved


@pytest.mark.parametrize(
    ("name", "poisoned", "hit"),
    [
        ("moe", 1, [1]),  # experts over the ranks: a rank's own samples
        ("dense", 2, [0, 1, 2, 3]),  # the last stage, first shard: it answers for the whole replica
    ],
)
def test_a_teachers_nan_on_one_rank_skips_the_step_everywhere(pool, pair, tmp_path, name, poisoned, hit):
    answers = pool(4).run(broken_step, pair, tmp_path, name, poisoned)
    samples = sorted(sample for rank in hit for sample in answers[rank][2])
    for applied, broken, _, moved in answers:
        assert not applied
        assert not moved
        assert list(broken) == [name]
        assert set(broken[name]) <= set(samples)
        assert len(broken[name]) >= len(samples) // 2, "samples without a hidden row are not asked about"


def test_the_log_names_teacher_and_samples(pool, pair, tmp_path):
    from tide_megatron.train.metrics import _listed

    assert _listed([3, 5]) == "3, 5"
    assert _listed(list(range(30))).endswith("8, 9 and 20 more")


def asked_about_others(file, folder):
    """Give the teacher of rank 3 the views of the next update's batches."""
    parts = prepared(file, folder)
    later = parts.loader.update(parts.loader.update_samples)
    teacher = parts.run.teachers["dense"]
    if dist.get_rank() == 3:
        ask = teacher.request
        teacher.request = lambda noised: ask([parts.run.noiser(batch) for batch in later])
    batches = parts.loader.update(0)
    try:
        train_step(parts.run, parts.run.read(batches), Clock(total_steps=4))
    except TideError as fault:
        return str(fault), [batch.sample_ids.tolist() for batch in batches]
    return None


def test_a_teacher_asked_about_other_samples_is_found_by_all(pool, pair, tmp_path):
    answers = pool(4).run(asked_about_others, pair, tmp_path)
    assert len({message for message, _ in answers}) == 1
    message, ids = answers[3]
    assert message.startswith("teachers.dense: on rank 3, microbatch 0, ")
    assert f"the student's {ids[0]};" in message


def die_in_the_schedule(file, folder, *, device, stop):
    """Kill rank 2, a last stage, in the second forward pass of its second step."""
    parts = prepared(file, folder)
    layer, passes = parts.run.teachers["dense"].model.decoder.layers[0], []

    def kill(*_):
        passes.append(1)
        if dist.get_rank() == 2 and len(passes) == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    layer.register_forward_pre_hook(kill)
    clock = Clock(total_steps=4)
    for _ in range(4):
        train_step(parts.run, parts.run.read(parts.loader.update(clock.consumed)), clock)
        clock = clock.after_step(applied=True, samples=parts.loader.update_samples)
    return "survived"


@pytest.mark.timeout(200)
def test_a_death_in_the_middle_of_a_schedule_ends_all_ranks(pair, tmp_path):
    started = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(die_in_the_schedule, (pair, tmp_path), 4, "cpu")
    assert re.match(r"^rank 2 of 4 failed first: it was killed by SIGKILL", str(caught.value))
    assert time.monotonic() - started < DEAD_AFTER_SECONDS
