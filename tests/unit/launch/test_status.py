"""`tide status`: the run's folder and SLURM's word, in a few lines or as JSON."""

import json

import pytest
from typer.testing import CliRunner

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.commands import app
from tide_megatron.launch.status import JOB_IDS, JOBS, look
from tide_megatron.train.history import note_end, note_start

SQUEUE = """#!/bin/sh
case "$*" in
  *17*) echo '17|PENDING|Priority|2026-12-01T10:00:00|' ;;
  *18*) echo '18|RUNNING|None|2026-11-28T10:00:00|n[1-2]' ;;
  *) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
esac
"""


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Put a program in the place of squeue's that knows two jobs; SLURM itself is asked in tests/slurm."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(SQUEUE)
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


def submitted(folder, *numbers):
    for place, number in enumerate(numbers, start=1):
        (folder / JOBS / f"{place:03d}").mkdir(parents=True)
        (folder / JOBS / f"{place:03d}" / JOB_IDS).write_text(f"{number}\n")
    return folder


def said(*words):
    result = CliRunner().invoke(app, ["status", *map(str, words)])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_queued_run_is_seen_before_it_has_started(tmp_path, squeue):
    folder = submitted(tmp_path / "run", "16", "17;cluster")
    words = said(folder)
    assert f"{folder}: queued job 17: pending, waits for Priority, since or from 2026-12-01T10:00:00" in words
    assert json.loads(said(folder, "--json"))["jobs"][0]["state"] == "PENDING"
    assert "job 16" not in words


def test_a_stopped_run_that_waits_for_its_next_turn_says_both(tmp_path, squeue):
    folder = submitted(tmp_path / "run", "17")
    (folder / "recipe.yaml").write_text("steps: 9\n")
    note_start(folder, Clock(total_steps=9, step=2), 1, 4)
    note_end(folder, "stopped", "SIGTERM", 5)
    words = said(folder)
    assert "stopped, queued again (SIGTERM)" in words
    assert "from step 2, 1 steps lost; stopped" in words


def test_a_running_job_names_its_nodes(tmp_path, squeue):
    (found,) = look(submitted(tmp_path / "run", "18")).jobs
    assert (found.state, found.nodes) == ("RUNNING", "n[1-2]")


def test_without_slurm_there_are_no_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = submitted(tmp_path / "run", "17")
    assert look(folder).jobs == []
    assert look(folder).state == "not started"


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_that_is_no_runs_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no run's folder"):
        look(tmp_path / name)


def test_several_runs_are_told_one_after_the_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("steps: 9\n")
    words = said(tmp_path / "a", tmp_path / "b")
    assert words.index("a: not started") < words.index("b: not started")
    assert [run["state"] for run in json.loads(said(tmp_path / "a", tmp_path / "b", "--json"))] == [
        "not started"
    ] * 2
