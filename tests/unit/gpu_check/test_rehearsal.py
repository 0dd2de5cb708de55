"""`make gpu-rehearse`: the very program that a GPU will run, in small, with a bare machine's packages."""

import json
import os
import subprocess
import sys

import pytest

from bench.gpu_goals import BENCHES, GOALS
from gpu_check.checks import CHECKS
from gpu_check.identity import ROOT


def gpu_check(*words):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    command = [sys.executable, "-m", "gpu_check", *words]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(280)
def test_the_rehearsal_passes(tmp_path):
    done = gpu_check("--rehearse", "--out", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-4000:]
    assert not [row for row in rows if row["verdict"] == "failed"]
    names = {check.name.split()[0] for check in CHECKS if check.rehearsed}
    assert names <= {row["check"].split()[0] for row in rows}
    assert {check.name for check in BENCHES} <= {row["check"] for row in rows}
    assert {f"goal: {goal.name}" for goal in GOALS} <= {row["check"] for row in rows}
    assert all(row["text"] for row in rows)
    assert "not measured" in (tmp_path / "table.md").read_text()


def test_without_a_gpu_the_check_says_so_in_a_sentence(tmp_path):
    done = gpu_check("--assets", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "make gpu-assets" in done.stderr
