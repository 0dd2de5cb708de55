"""Saves in the background: what they hold, what disturbs them, and what a failing one leaves."""

import logging
import resource
import shutil
import signal
import time

import pytest

from tests.parallel.test_resume import losses, run
from tests.tiny_run import write_tiny_run
from tide_megatron.base.files import damage
from tide_megatron.checkpoint import save
from tide_megatron.checkpoint.retention import Checkpoints, Mark, listed
from tide_megatron.checkpoint.save import Save


def run_on_a_slow_disk(seconds, *args):
    """Train while every save's writing begins so much later."""
    write = Save.write

    def late(self):
        time.sleep(seconds)
        write(self)

    Save.write = late
    try:
        return run(*args)
    finally:
        Save.write = write


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, pool, tmp_path_factory):
    """Return a number of ranks, a recipe, and the losses of its run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny = write_tiny_run(folder / "tiny")
    pool(request.param).run(run, tiny, folder / "whole", request.param, 1000, 1)
    return request.param, tiny, losses(folder / "whole")


@pytest.mark.parametrize("words", [("student.precision=bf16",), ("optimizer.distributed=false",)])
def test_a_save_holds_the_step_it_began_at_however_late_it_is_written(pool, tmp_path, words):
    tiny = write_tiny_run(tmp_path / "tiny")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    words = (*words, "checkpoints.every=2", "checkpoints.keep=9")
    pool(2).run(run_on_a_slow_disk, 1.0, tiny, whole, 2, 1000, 1, words)
    first, *_ = listed(whole / "checkpoints")
    assert first.name.startswith("step-00000002-")
    shutil.copytree(whole, parted)
    for later in listed(parted / "checkpoints")[1:]:
        shutil.rmtree(later)
    pool(2).run(run, tiny, parted, 2, 1000, 1, words)
    assert losses(parted) == losses(whole)
    assert len(losses(whole)) == 8


def test_a_second_save_waits_for_the_first_and_a_stop_for_the_last(pool, tmp_path):
    tiny = write_tiny_run(tmp_path / "tiny")
    folder = tmp_path / "run"
    words = ("checkpoints.every=1", "checkpoints.keep=9")
    heard = pool(2).run(hear, run_on_a_slow_disk, 0.5, tiny, folder, 2, 2, 1, words)
    assert [path.name[:13] for path in listed(folder / "checkpoints")] == [f"step-{n:08d}" for n in (1, 2, 3)]
    assert not any(damage(path) for path in listed(folder / "checkpoints"))
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert any("is not written yet; waiting for it" in line for line in heard[0])


def losses_to_a_kill(folder, *args):
    """Train on a slow disk; return how many updates a kill after each of them would have cost."""
    before_step, cost = save.Saver.before_step, []

    def noting(self, clock):
        before_step(self, clock)
        newest = listed(folder / "checkpoints")[-1:]
        cost.append(clock.step + 1 - (Mark.of(newest[0]).step if newest else 0))

    save.Saver.before_step = noting
    try:
        run_on_a_slow_disk(0.7, *args)
    finally:
        save.Saver.before_step = before_step
    return cost


@pytest.mark.parametrize(("every", "costs"), [(4, [1, 2, 3, 4, 5, 2, 3, 4]), (1, [1] * 8)])
def test_a_kill_costs_an_interval_and_a_quarter_at_most_on_a_disk_however_slow(pool, tmp_path, every, costs):
    assert Checkpoints(every=every).most_ahead == (every == 4)
    tiny, folder = write_tiny_run(tmp_path / "tiny"), tmp_path / "run"
    words = (f"checkpoints.every={every}", "checkpoints.keep=9")
    assert pool(2).run(losses_to_a_kill, folder, tiny, folder, 2, 1000, 1, words)[0] == costs


def hear(function, *args):
    """Call a function and return the lines it logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("tide_megatron")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        function(*args)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines


def run_on_a_full_disk(only_rank, limit, *args):
    """Train; on one rank no file may grow beyond the limit."""
    import torch.distributed as dist

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == only_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return run(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
@pytest.mark.parametrize(("rank", "mode"), [(0, "true"), (1, "false")])
def test_a_full_disk_on_one_rank_ends_all_and_the_run_goes_on_when_there_is_room(
    pool, undisturbed, tmp_path, rank, mode
):
    (_, tiny, wanted), parted = undisturbed, tmp_path / "parted"
    words = ("checkpoints.every=2", f"checkpoints.asynchronous={mode}")
    pool(2).run(run, tiny, parted, 2, 2, 1, words)  # saved after 2 and after the stop at 3
    before = [path.name for path in listed(parted / "checkpoints")]
    with pytest.raises(
        Exception, match=r"rank 0(.|\n)*cannot be written \((.|\n)*rank 1(.|\n)*cannot be written \("
    ):
        pool(2).run(run_on_a_full_disk, rank, 20_000, tiny, parted, 2, 1000, 1, words)
    assert [path.name for path in listed(parted / "checkpoints")] == before
    assert not any(damage(path) for path in listed(parted / "checkpoints"))
    pool(2).run(run, tiny, parted, 2, 1000, 1, words)
    assert losses(parted) == wanted
    assert not list((parted / "checkpoints").glob("*.partial"))


class Killed(BaseException):
    """The process ends here."""


def die_instead_of(name, *args):
    """Train until a save calls a function of this name; stop there as a kill would."""

    def die(*_):
        raise Killed

    kept = getattr(save, name)
    setattr(save, name, die)
    try:
        run(*args)
    except Killed:
        return True
    finally:
        setattr(save, name, kept)
    return False


@pytest.mark.parametrize(
    ("window", "goes_on_from"),
    [("write_digests", 2), ("commit_folder", 2), ("point_latest", 4), ("remove_expired", 4)],
)
@pytest.mark.parametrize("undisturbed", [1], indirect=True)
def test_a_kill_around_the_rename_loses_at_most_that_save(pool, undisturbed, tmp_path, window, goes_on_from):
    (_, tiny, wanted), parted = undisturbed, tmp_path / "parted"
    words = ("checkpoints.every=2", "checkpoints.asynchronous=false")
    pool(1).run(run, tiny, parted, 1, 1, 1, words)  # the stop at 2 saves
    assert pool(1).run(die_instead_of, window, tiny, parted, 1, 1000, 1, words) == [True]
    [lines] = pool(1).run(hear, run, tiny, parted, 1, 1000, 1, words)
    assert any(f"resumed from step {goes_on_from}," in line for line in lines)
    assert losses(parted) == wanted
