"""`tide train` in real processes: a sample of `tools/kill_test.py`, then orderly ends by signals.

One kill, at a moment drawn from a seed; the run goes on, is stopped, goes on and is stopped again.
"""

import json
import signal

import pytest

from kill_test import RECORD, Life, last_step, run

pytestmark = pytest.mark.timeout(280)


def test_a_killed_run_loses_one_interval_at_most_and_a_stopped_one_nothing(tmp_path):
    tally = run(kills=1, ranks=2, seed=5, folder=tmp_path)
    assert tally.kills == 1
    assert tally.is_good, tally
    folder = tmp_path / "killed"
    done = last_step(folder)
    life = Life(tmp_path / "tiny/run.yaml", folder, ranks=2, is_asynchronous=True)
    assert life.wait_for_step() == done, "Ctrl-C saves, the same command goes on from there"
    life.stop(signal.SIGTERM)
    steps = [json.loads(line)["step"] for line in (folder / RECORD).read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > done
    assert (folder / "checkpoints/latest").is_file()
