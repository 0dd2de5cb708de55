"""`tide train` as a user starts it: Ctrl-C and going on, and a recipe that cannot be, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "tide_megatron.commands", "train"]

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


def start(recipe, folder, *words):
    """Start `tide train` on two ranks, in a session of its own as a terminal would give it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [
            *TRAIN,
            str(recipe),
            "--ranks",
            "2",
            "--folder",
            str(folder),
            "teachers.moe.layout.expert=2",
            *words,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, tmp_path):
    run = start(recipe, tmp_path / "run", "steps=100000")
    while len(lines_of(tmp_path / "run")) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 0, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    before = lines_of(tmp_path / "run")
    assert (tmp_path / "run/checkpoints/latest").is_file()
    run = start(recipe, tmp_path / "run", "steps=100000")
    while len(lines_of(tmp_path / "run")) <= len(before):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 0, said
    assert f"resumed from step {before[-1]['step']}" in said
    steps = [line["step"] for line in lines_of(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_recipe_that_cannot_be_is_one_message_and_leaves_nothing(recipe, tmp_path):
    run = start(recipe, tmp_path / "run", "teachers.moe.layout.expert=4")
    said, complaint = run.communicate()
    assert run.returncode == 2
    assert said == ""
    errors = [line for line in complaint.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: teachers.moe.layout {expert=4}: ")
    assert "nearest legal layout is {expert=2}" in errors[0]
    assert "Traceback" not in complaint
