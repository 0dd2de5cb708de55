"""When the job ends: SLURM's variable first, then squeue, and no error where neither is there."""

import time

import pytest

from tide_megatron.launch.squeue import job_end


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """Give a function that puts a squeue with this answer, or none, on the path."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def says(answer):
        program = tmp_path / "squeue"
        program.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs=71 --format=%L" ] && echo "{answer}"\n')
        program.chmod(0o755)

    return says


def seconds_left():
    end = job_end()
    return None if end is None else end - time.monotonic()


def test_outside_of_a_job_there_is_no_end(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "12")
    assert job_end() is None


def test_slurms_variable_is_believed(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    squeue("1:00:00")
    assert seconds_left() == pytest.approx(100, abs=2)


@pytest.mark.parametrize("variable", ["", "NONE"])
@pytest.mark.parametrize(
    ("answer", "left"), [("1-00:01:00", 86_460), ("UNLIMITED", None), ("INVALID", None), ("", None)]
)
def test_squeue_is_asked_else(squeue, monkeypatch, variable, answer, left):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_JOB_END_TIME", variable)
    assert job_end() is None
    squeue(answer)
    assert seconds_left() == (None if left is None else pytest.approx(left, abs=2))
