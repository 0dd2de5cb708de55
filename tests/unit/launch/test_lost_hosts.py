"""Which host a launcher writes down, and which ones a job's script leaves out of the next start."""

import pytest

from tests.unit.launch.test_submit import job
from tide_megatron.base.errors import RanksLost
from tide_megatron.launch import ranks
from tide_megatron.launch.job import JobOptions
from tide_megatron.launch.job_script import render
from tide_megatron.launch.lost_hosts import VARIABLE, own_host


@pytest.mark.parametrize(
    ("lost", "left_out"),
    [
        ("", None),
        ("0 n1\n0 n1\n", None),  # the launchers of two nodes tell one loss
        ("0 n1\n1 n2\n", None),
        ("0 n1\n1 n1\n1 n2\n3 n2\n4 n3\n", "n1,n2"),
    ],
)
def test_a_host_that_lost_ranks_in_two_starts_is_left_out(tmp_path, machine, lost, left_out):
    given = job(tmp_path)
    given.folder.mkdir()
    (given.folder / "71234.lost_hosts").write_text(lost)
    done, calls = machine(render(given), CODE="70", STATE="RUNNING")
    assert [call[2:] for call in calls["scontrol"]] == [
        ["requeue", "71234"],
        *([] if left_out is None else [["update", "JobId=71234", f"ExcNodeList={left_out}"]]),
    ]
    assert (f"ranks were lost on {left_out} in two starts" in done.stdout) == (left_out is not None)


@pytest.mark.parametrize("options", [JobOptions(shape="rank"), JobOptions(restarts=0)])
def test_hosts_are_noted_only_where_launchers_tell_them_and_the_job_comes_back(tmp_path, options):
    assert "LOST_HOSTS" not in render(job(tmp_path, options))


def test_the_host_of_a_lost_rank_is_written_down_with_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert own_host() == "n7"
    lost = tmp_path / "lost"
    monkeypatch.setenv(VARIABLE, str(lost))

    def lose(host):
        def supervise(*_):
            raise RanksLost("rank 1 of 2 failed first: it was killed", host)

        monkeypatch.setattr(ranks, "supervise", supervise)
        with pytest.raises(RanksLost):
            ranks._supervise_noting(None, 2, 1.0, None)

    lose("n7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    lose("n8")
    lose("")
    assert lost.read_text() == "0 n7\n3 n8\n"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone/lost"))
    lose("n9")
    monkeypatch.delenv(VARIABLE)
    lose("n9")
