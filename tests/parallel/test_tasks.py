"""Tasks over ranks: any number of ranks and of kills gives one rank's answers, to the letter."""

import os
import random
import signal
import threading
import time

import pytest

from tests.harness_tasks import write_tasks
from tests.parallel.pool import RankFailure
from tests.small_task import Repeat, evaluated, write_student
from tide_megatron.base.device import Device
from tide_megatron.base.stop import StopFlag
from tide_megatron.tasks import TASKS
from tide_megatron.tasks.answers import count_answers, read_answers
from tide_megatron.tasks.evaluation import TaskEvaluation, evaluate_tasks
from tide_megatron.tasks.suite import chosen_entries

CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


def evaluate(student, out, words=("repeat",), include=None, dies_at=None, number=9):
    """Evaluate; with `dies_at` (answers, seconds) the last rank is killed so long behind so many."""
    import torch.distributed as dist

    from tide_megatron.tasks import runner

    TASKS["repeat"] = lambda: Repeat(number=number)
    runner.WRITE_SECONDS = 0.0  # every answer as it comes, for kills in between
    if dies_at is not None and dist.get_rank() == dist.get_world_size() - 1:
        threading.Thread(target=_die, args=(out / "repeat", *dies_at), daemon=True).start()
    options = TaskEvaluation(suite=chosen_entries(words), out=out, draws=6, include=include)
    found = evaluate_tasks(student, options, device=CPU, stop=StopFlag())
    if dies_at is not None:
        time.sleep(60)
    return {name: (one["score"], one["interval"], one["questions"]) for name, one in found["tasks"].items()}


def _die(folder, answers, seconds):
    while count_answers(folder) < answers:
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def answers_of(folder):
    """Return all answers without the time that they took, numbers of a model in six digits."""
    found = {}
    for task in sorted(folder.glob("*/asked.json")):
        for name, answer in read_answers(task.parent).items():
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in answer.items()}
            found[task.parent.name, name] = {key: rounded[key] for key in rounded if key != "seconds"}
    return found


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student"), window=33)


def test_four_ranks_answer_as_one_does(student, tmp_path, pool):
    [one] = pool(1).run(evaluate, student, tmp_path / "one")
    assert pool(4).run(evaluate, student, tmp_path / "four") == [one] * 4
    assert len(list((tmp_path / "four/repeat").glob("answers-*.jsonl"))) == 4
    assert answers_of(tmp_path / "four") == answers_of(tmp_path / "one")
    # another number of ranks goes on with what four have begun
    (tmp_path / "four/repeat/answers-0002.jsonl").unlink()
    assert pool(1).run(evaluate, student, tmp_path / "four") == [one]
    assert answers_of(tmp_path / "four") == answers_of(tmp_path / "one")


def test_two_ranks_of_the_harness_answer_as_one_does(student, tmp_path, pool):
    include = write_tasks(tmp_path / "tasks")
    words = ["local_words", "local_choices"]
    own = evaluated(student, words, out=tmp_path / "one", include=include, draws=6)["tasks"]
    one = {name: (found["score"], found["interval"], found["questions"]) for name, found in own.items()}
    assert pool(2).run(evaluate, student, tmp_path / "two", words, include) == [one] * 2
    assert answers_of(tmp_path / "two") == answers_of(tmp_path / "one")


def test_killed_and_gone_on_with_is_uninterrupted(student, tmp_path, pool):
    killed_until_done(student, tmp_path, pool(2), kills=2, number=9)


@pytest.mark.slow
def test_ten_kills_of_a_rank(student, tmp_path, pool):
    killed_until_done(student, tmp_path, pool(2), kills=10, number=60)


def killed_until_done(student, folder, ranks, kills, number):
    """Kill a rank at random moments, `kills` times; what is gone on with ends as what never stopped."""
    plain = (("repeat",), None, None, number)
    whole = ranks.run(evaluate, student, folder / "whole", *plain)[0]
    draw, counts = random.Random(7), [0]
    for _ in range(kills):
        wanted = min(number, counts[-1] + draw.randint(1, max(1, number // kills - 2)))
        dies_at = wanted, draw.uniform(0.0, 0.05)
        with pytest.raises(RankFailure, match="the process died, exit code -9"):
            ranks.run(evaluate, student, folder / "killed", ("repeat",), None, dies_at, number)
        counts.append(count_answers(folder / "killed/repeat"))
    print("answers after each kill:", counts)
    assert counts == sorted(counts)  # nothing that was written is lost
    assert ranks.run(evaluate, student, folder / "killed", *plain)[0] == whole
    assert answers_of(folder / "killed") == answers_of(folder / "whole")
