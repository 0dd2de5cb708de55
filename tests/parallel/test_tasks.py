"""Tasks over ranks: any number of ranks and of kills gives one rank's answers, to the letter."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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

ROOT = Path(__file__).parents[2]
CPU = Device(type="cpu", index=0, backend="gloo", threads=1)


def evaluate(student, out, words=("repeat",), include=None, die_after=None):
    """Evaluate in this world; with `die_after` the last rank kills itself after so many seconds."""
    import torch.distributed as dist

    from tide_megatron.tasks import runner

    TASKS["repeat"] = Repeat
    runner.WRITE_SECONDS = 0.0  # every answer as it comes, for kills in between
    if die_after is not None and dist.get_rank() == dist.get_world_size() - 1:
        timer = threading.Timer(die_after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    options = TaskEvaluation(suite=chosen_entries(words), out=out, draws=6, include=include)
    found = evaluate_tasks(student, options, device=CPU, stop=StopFlag())
    if die_after is not None:
        time.sleep(max(0.0, die_after))
    return {name: (one["score"], one["interval"], one["questions"]) for name, one in found["tasks"].items()}


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
    killed_until_done(student, tmp_path, pool(2), kills=2)


def killed_until_done(student, folder, ranks, kills):
    """Kill a rank at random moments, `kills` times; what is gone on with ends as what never stopped."""
    began = time.monotonic()
    whole = ranks.run(evaluate, student, folder / "whole")[0]
    usual, draw = time.monotonic() - began, random.Random(7)
    counts = []
    while len(counts) < kills:
        with pytest.raises(RankFailure, match="the process died, exit code -9"):
            ranks.run(evaluate, student, folder / "killed", ("repeat",), None, draw.uniform(0.1, usual))
        counts.append(count_answers(folder / "killed/repeat"))
    assert counts == sorted(counts)  # nothing that was written is lost
    assert ranks.run(evaluate, student, folder / "killed")[0] == whole
    assert answers_of(folder / "killed") == answers_of(folder / "whole")


SCRIPT = """\
import dataclasses, sys
from tests.small_task import DECODING, Repeat
from tide_megatron import api
from tide_megatron.tasks import TASKS

TASKS["repeat"] = lambda: Repeat(number=240, decoding=dataclasses.replace(DECODING, batch=3))
if __name__ == "__main__":
    options = api.TaskOptions(out=sys.argv[2])
    api.evaluate(sys.argv[1], tasks=["repeat"], on_tasks=options, ranks=2, device="cpu")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_of_the_whole_command(student, tmp_path):
    """The launcher is killed at ten random moments, and its ranks end with it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(out):
        words = [sys.executable, str(tmp_path / "script.py"), str(student), str(tmp_path / out)]
        return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)

    draw, counts = random.Random(11), [0]
    for _ in range(10):
        life = start("killed")
        wanted = counts[-1] + draw.randint(1, 5)
        while count_answers(tmp_path / "killed/repeat") < wanted and life.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 0.5))
        life.kill()
        assert life.wait() == -signal.SIGKILL, "it ended before it was killed"
        time.sleep(1.0)  # its ranks see that it is gone
        counts.append(count_answers(tmp_path / "killed/repeat"))
    print("answers after each kill:", counts)
    assert start("whole").wait(600) == start("killed").wait(600) == 0
    assert answers_of(tmp_path / "killed") == answers_of(tmp_path / "whole")
    assert len(answers_of(tmp_path / "whole")) == 240
