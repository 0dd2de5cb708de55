"""Starting ranks: values come back, the first failure is told once and soon, signals work, nothing is left.

Most cases call `run_ranks` from the test process, whose warm server makes ranks in 0.1 s; what needs a parent
of its own (its death, torchrun) runs `tests.parallel.launch_cases` as a command.
"""

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests.parallel import launch_cases as cases
from tide_megatron.base.deadlines import Deadlines
from tide_megatron.base.errors import ConfigError, DataError, RanksFailed, RanksLost
from tide_megatron.base.phases import PHASES
from tide_megatron.base.stop import Stopped
from tide_megatron.launch import flight_recorder
from tide_megatron.launch.doctor import compare_parallel
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.launch.supervisor import first_failure
from tide_megatron.launch.worker import Failure

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(200)  # a fault in this layer is a hang

COMMAND = [sys.executable, "-m", "tests.parallel.launch_cases"]


@pytest.fixture(autouse=True)
def no_ranks_around(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run(case, folder, num_ranks=2, **options):
    return run_ranks(case, (str(folder),), num_ranks, "cpu", **options)


@pytest.mark.parametrize(
    ("how", "state", "has_stack"),
    [
        ("asleep", "waiting", True),
        ("holding the interpreter", "waiting", True),
        ("stopped", "stopped by a signal", False),
    ],
)
def test_a_rank_that_stands_still_is_named_with_what_all_are_at(tmp_path, how, state, has_stack):
    started = time.monotonic()
    with pytest.raises(RanksLost) as caught:
        run_ranks(cases.stand_still, (str(tmp_path), how), 3, "cpu", hang_seconds=2.0)
    assert time.monotonic() - started < 60
    said = str(caught.value)
    limit = r"( \(limit 2 s: hang_seconds\))?"  # each rank's own: another one may pass it a moment earlier
    first = (
        rf"rank 1 of 3 failed first: it stands still: for \d+ s nothing new in teacher{limit} after 3 updates"
    )
    assert re.match(first, said)
    assert "(limit 2 s: hang_seconds)" in said
    assert f" {state}, in " in said.splitlines()[0]
    assert len(re.findall(rf"nothing new in exchange{limit} after 3 updates", said)) == 2
    assert "collectives.py, barrier" in said
    assert said.count(", waits for gloo:barrier of nothing, call 4 of group 0") == 2, said
    assert ("wait_for_ever" in said) == has_stack
    stacks = Path(said.rpartition("stacks of all ranks of this node: ")[2])
    assert {path.name for path in stacks.glob("*.txt")} == {f"rank-{rank}.txt" for rank in range(3)}
    shutil.rmtree(stacks)


@pytest.mark.parametrize(
    "phase",
    ["data", "checkpoint", *(pytest.param(name, marks=pytest.mark.slow) for name in PHASES[1:-1])],
)
def test_a_phase_with_a_deadline_of_its_own_ends_by_it(tmp_path, monkeypatch, phase):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RanksLost) as caught:
        run_ranks(
            cases.stand_still,
            (str(tmp_path), "asleep", phase),
            2,
            "cpu",
            hang_seconds=100.0,
            deadlines=Deadlines(**{phase: 1.5}),
        )
    said = str(caught.value).splitlines()
    assert re.match(
        rf"rank 1 of 2 failed first: it stands still: for [1-4] s nothing new in {phase} "
        rf"\(limit 1\.5 s: deadlines\.{phase}\) after 3 updates",
        said[0],
    ), said
    assert any(
        re.match(r"rank 0: for \d+ s nothing new in exchange( \(.*\))? after 3", line) for line in said
    )


@pytest.mark.slow
def test_a_launcher_does_not_wait_for_a_recorder_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    case = cases.fall_asleep_with_a_mute_recorder
    with pytest.raises(RanksLost) as caught:
        run_ranks(case, (str(tmp_path), flight_recorder.ANSWER_SECONDS), 2, "cpu", hang_seconds=2.0)
    said = str(caught.value).splitlines()
    assert said[0].startswith("rank 1 of 2 failed first: it stands still")
    [other] = [line for line in said if line.startswith("rank 0: ")]
    assert other.endswith("waits for what its flight recorder did not tell in time"), other


def test_what_may_take_longer_is_no_hang_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_ranks(cases.finish_slowly, ("",), 2, "cpu", hang_seconds=1.0) == "finished"
    assert list(tmp_path.glob("tide-ranks-*")) == []


def ranks_by_hand(case, folder):
    """Start two ranks that have no launcher; return the exit code and the words of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HANG_SECONDS": "2"}
    ranks = [
        subprocess.Popen(
            [*COMMAND, case, "0", str(folder)],
            cwd=ROOT,
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], said


def test_ranks_without_a_launcher_look_at_themselves(tmp_path):
    codes, said = ranks_by_hand("fall_asleep", tmp_path)
    assert codes == [1, 1], "nothing was saved"
    words = "rank {} stands still or waits for one that does: for \\d+ s nothing new in {}"
    assert re.search(words.format(1, "teacher .limit 2 s: hang_seconds. after 3 updates"), said[1]), said
    assert 'launch_cases.py", line' in said[1]
    assert "in wait_for_ever" in said[1]
    if "lost its peers" not in said[0]:  # whichever looks first ends first; rank 1, asleep, notices nothing
        assert re.search(words.format(0, "exchange"), said[0]), said
        assert "rank 0 waits for gloo:barrier of nothing" in said[0]
        assert "in barrier" in said[0]


@pytest.mark.slow
def test_a_rank_ends_itself_though_its_flight_recorder_never_answers(tmp_path):
    codes, said = ranks_by_hand("fall_asleep_with_a_mute_recorder", tmp_path)
    assert codes == [1, 1]
    assert "rank 1 stands still or waits for one that does" in said[1]
    assert "Timeout (0:00:03)!" in said[1], "C code wrote the stacks: the interpreter was held"
    if "lost its peers" not in said[0]:
        mute = "rank 0 waits for what torch's flight recorder did not tell within 1 s"
        assert mute in said[0]


def within(seconds, condition, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_alive(pid_file):
    """Say whether the process whose number the file holds still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid_file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def signal_when_running(folder, numbers, pause_seconds=0.3):
    """Send signals to this process, as a terminal would, once both ranks run."""

    def send():
        within(120, lambda: all((folder / f"running-{rank}").exists() for rank in (0, 1)), "ranks run")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause_seconds)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_ranks_share_a_world_and_rank_0_answers(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run(cases.add_ranks, tmp_path) == {"sum": 3.0, "world": 2, "threads": share}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run(cases.add_ranks, tmp_path)["threads"] == 3


def test_one_rank_runs_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for _ in range(2):  # the world is left again
        assert run(cases.add_ranks, tmp_path, num_ranks=1)["world"] == 1
        with pytest.raises(ConfigError, match=r"^teachers\.big\.layout: expert=4 does not fit 1 ranks"):
            run(cases.wrong_world, tmp_path, num_ranks=1)


def test_a_fault_of_one_rank_ends_all_that_wait_for_it(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^data/train\.jsonl line 7: .*record \(seen by rank 1 of 2\)$"):
        run(cases.one_bad_file, tmp_path)
    assert time.monotonic() - start < 30  # it would be 60


def test_a_fault_of_one_rank_ends_ranks_that_do_not_notice(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"\(seen by rank 1 of 2\)$"):
        run(cases.one_bad_file_others_deaf, tmp_path)
    assert time.monotonic() - start < 30  # it would be 60


def test_a_fault_that_all_ranks_see_is_told_once_and_without_a_rank(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^teachers\.big\.layout: expert=4 does not fit 2 ranks; use expert=2$"
    ):
        run(cases.wrong_world, tmp_path)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (cases.bug, r"(?s)^rank 1 of 2 failed first: Traceback.*in bug\n.*ZeroDivisionError: planted bug"),
        (cases.killed, r"^rank 1 of 2 failed first: it was killed by SIGKILL"),
        (cases.vanished, r"^rank 1 of 2 failed first: it ended with exit code 7 without a report$"),
    ],
)
def test_a_bug_or_a_death_names_the_first_rank(tmp_path, case, words):
    with pytest.raises(RanksFailed, match=words):
        run(case, tmp_path)


def test_the_earliest_failure_wins_and_echoes_come_last():
    def failure(rank, at_seconds, *, is_echo=False, error=None):
        return Failure(rank=rank, at_seconds=at_seconds, text=f"text {rank}", is_echo=is_echo, error=error)

    chosen = first_failure([failure(0, 1.0, is_echo=True), failure(1, 3.0), failure(2, 2.0)], 4)
    assert str(chosen) == "rank 2 of 4 failed first: text 2"
    chosen = first_failure([failure(3, 2.0, is_echo=True), failure(1, 1.0, is_echo=True)], 4)
    assert str(chosen) == "rank 1 of 4 failed first: text 1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_lets_ranks_save_and_return(tmp_path, number):
    thread = signal_when_running(tmp_path, [number])
    assert run(cases.train_until_stopped, tmp_path) >= 3
    thread.join()
    saved = [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)]
    assert set(saved) <= {signal.Signals(number).name, "None"}  # one rank may learn it from the other
    assert signal.Signals(number).name in saved


def test_a_stop_signal_during_the_start_ends_ranks_that_have_nothing_to_save(tmp_path, monkeypatch):
    def interrupt():
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        resource_tracker.ensure_running()

    monkeypatch.setattr(resource_tracker, "ensure_running", interrupt)
    with pytest.raises(Stopped, match=r"^stopped by SIGINT$"):
        run(cases.train_until_stopped, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once_with_all_that_ranks_started(tmp_path):
    thread = signal_when_running(tmp_path, [signal.SIGINT, signal.SIGINT], pause_seconds=0.6)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught:
        run(cases.ignore_the_flag, tmp_path)
    assert caught.type is KeyboardInterrupt
    thread.join()
    assert time.monotonic() - start < 30  # it would be 60
    files = [tmp_path / f"{kind}-{rank}" for kind in ("pid", "child") for rank in (0, 1)]
    within(5, lambda: not any(map(is_alive, files)), "everything has ended")
    assert {path.name for path in tmp_path.glob("farewell-*")} == {"farewell-0", "farewell-1"}


def test_ranks_that_do_not_stop_are_killed_after_the_grace(tmp_path):
    thread = signal_when_running(tmp_path, [signal.SIGTERM])
    with pytest.raises(RanksFailed, match=r"SIGTERM: ranks \[0, 1\] did not finish within 1 seconds"):
        run(cases.ignore_the_flag, tmp_path, grace_seconds=1.0)
    thread.join()
    assert {path.name for path in tmp_path.glob("farewell-*")} == {"farewell-0", "farewell-1"}


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    parent = subprocess.Popen([*COMMAND, "ignore_the_flag", "2", str(tmp_path)], cwd=ROOT)
    files = [tmp_path / f"{kind}-{rank}" for kind in ("pid", "child") for rank in (0, 1)]
    running = [tmp_path / f"running-{rank}" for rank in (0, 1)]
    within(120, lambda: all(file.exists() for file in running), "ranks run")
    assert all(map(is_alive, files))
    parent.kill()
    parent.wait()
    within(5, lambda: not any(map(is_alive, files)), "everything has ended")


def test_ranks_of_torchrun_are_taken(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", "-m", *COMMAND[2:], "add_then_fail", "0", str(tmp_path)]
    done = subprocess.run(torchrun, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.count("together {'sum': 3.0, 'world': 2") == 2, done.stderr
    assert done.returncode == 1
    assert "[rank 1 of 2] data/train.jsonl line 7: no reply" in done.stderr
    assert "rank 0 of 2 lost its peers" in done.stderr


def test_ranks_of_slurm_are_taken(tmp_path, monkeypatch):
    for name, value in {"PROCID": "0", "LOCALID": "0", "NTASKS": "1", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert run(cases.add_ranks, tmp_path, num_ranks=None)["world"] == 1


@pytest.fixture
def with_gpus(tmp_path):
    """Give a function that runs ranks on the CPU from a process that was prepared for the GPUs it sees."""

    def run_it(num_ranks, folder=tmp_path, **variables):
        script = (
            "import torch; torch.cuda.is_available = lambda: True\n"
            "from tests.parallel import launch_cases as cases\n"
            "assert not cases.prepare_platform().redirected_to_cpu\n"
            f"sys.argv[1:] = ['what_is_visible', '{num_ranks}', '{folder}']\n"
            "print('parent', os.getpid()); cases.main()"
        )
        command = [sys.executable, "-c", f"import os, sys\n{script}"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", **variables}
        return subprocess.run(
            command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=180, env=environment
        )

    return run_it


def test_even_one_rank_on_the_cpu_is_started_where_it_sees_no_gpus(with_gpus):
    done = with_gpus(1)
    assert done.returncode == 0, done.stderr
    parent, seen = re.fullmatch(r"parent (\d+)\nvalue (\{.*\})\n", done.stdout).groups()
    seen = ast.literal_eval(seen)
    assert seen.pop("process") != int(parent)
    assert [seen.pop(name) for name in ("world", "sum")] == [1, 1.0]
    seen.pop("threads")
    assert seen == {"hidden at start": True, "hidden": True, "prepared for the CPU": True}


def test_ranks_of_others_on_the_cpu_that_see_gpus_are_told_how_to_hide_them(with_gpus):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = with_gpus(0, **place, MASTER_PORT="1")  # where nobody waits, and nobody is waited for
    assert done.returncode == 2, done.stderr
    assert "[rank 0 of 2] device: 'cpu' is asked of ranks that see GPUs" in done.stderr
    assert "put CUDA_VISIBLE_DEVICES= (empty) before the command" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_group_waits_as_long_as_the_run_says(tmp_path):
    sizes, number, waits = run(cases.group_timeouts, tmp_path, num_ranks=4, timeout_seconds=37.5)
    assert sizes == [1, 2, 4]
    assert waits == [37.5] * number
    assert number > 10


def test_a_rank_that_never_comes_ends_a_collective_of_a_part_of_the_ranks(tmp_path):
    with pytest.raises(RanksFailed, match=r"rank 0 of 4 failed first: (?s:.*)[Tt]imed out"):
        run(cases.wait_in_vain, tmp_path, num_ranks=4, timeout_seconds=10.0)
    assert 9 < float((tmp_path / "waited-0").read_text()) < 20  # torch's own is 30 minutes


def test_numbers_of_ranks_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"ranks: 0 is not a number of ranks"):
        run(cases.add_ranks, tmp_path, num_ranks=0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for wanted, said in [
        (4, "on 4 ranks, but torchrun or srun started 2 processes of it; start 4 processes"),
        (1, "on 1 rank, but torchrun or srun started 2 processes of it; run it once, without them"),
    ]:
        with pytest.raises(ConfigError, match=f"^ranks: this command is to run {said}"):
            run(cases.add_ranks, tmp_path, num_ranks=wanted)


def test_the_doctors_check_finds_parallel_equal_to_dense(tmp_path):
    facts = run_ranks(compare_parallel, (), 2, "cpu")
    assert facts["sum"] == 3.0
    assert facts["difference"] < 1e-5
    assert facts["alltoall_bytes"] > 0
