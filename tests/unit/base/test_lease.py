"""One process at a time: of any number of starts one proceeds, the dead make nobody wait, nothing stays."""

import contextlib
import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tide_megatron.base import lease as lease_module
from tide_megatron.base import owner as owner_module
from tide_megatron.base.device import read_job
from tide_megatron.base.errors import CheckpointError, ConfigError, TideError
from tide_megatron.base.lease import LEASE, lease_beside, leased
from tide_megatron.base.owner import Holder
from tide_megatron.base.stop import StopFlag

FAST = {"renew_seconds": 0.05, "stale_seconds": 0.4}


def child(work):
    """Do work in a process of its own; return its pid."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except TideError:
            code = 2
        finally:
            os._exit(code)
    return pid


def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def held_by_child(path, **options):
    """Start a process that takes a lease and keeps it; return its pid once it has it."""
    reader, writer = os.pipe()

    def work():
        with leased(path, "it", **{**FAST, **options}):
            os.write(writer, b"x")
            time.sleep(60)

    pid = child(work)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


@contextlib.contextmanager
def ending(pid):
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def write(path, **facts):
    """Write a lease as a process elsewhere would, touched as long ago as `age` says."""
    age = facts.pop("age", 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = {"token": "t", "host": "elsewhere", "pid": 7, "machine": "m", "process_start": "1", **facts}
    path.write_text(json.dumps(there))
    os.utime(path, (time.time() - age, time.time() - age))


def take(path, **options):
    """Take a lease and give it up; return how long that took."""
    started = time.monotonic()
    with leased(path, "folder: run", **{**FAST, **options}):
        return time.monotonic() - started


def test_a_lease_names_its_holder_is_renewed_and_leaves_nothing(tmp_path):
    path = tmp_path / "a/b" / LEASE
    with leased(path, "it", **FAST) as lease:
        facts, before = json.loads(path.read_text()), path.stat().st_mtime_ns
        assert (facts["pid"], facts["host"]) == (os.getpid(), os.uname().nodename)
        assert [one.name for one in path.parent.iterdir()] == [LEASE]
        time.sleep(0.2)
        assert path.stat().st_mtime_ns > before
        lease.check()
    assert list(tmp_path.iterdir()) == [], "folders that only the lease needed go with it"
    with leased(path, "it", **FAST):
        (path.parent / "more").write_text("x")
    assert [one.name for one in path.parent.iterdir()] == ["more"]


def test_a_living_holder_here_is_named_at_once(tmp_path):
    pid = held_by_child(tmp_path / LEASE)
    with ending(pid):
        started = time.monotonic()
        with pytest.raises(
            ConfigError, match=rf"^folder: run: in use by host .*, pid {pid}; wait for it"
        ) as caught:
            take(tmp_path / LEASE, kind=ConfigError, stale_seconds=60.0)
        assert time.monotonic() - started < 5
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_collected", [True, False])
def test_the_dead_here_make_nobody_wait(tmp_path, is_collected):
    pid = held_by_child(tmp_path / LEASE)
    os.kill(pid, signal.SIGKILL)
    if is_collected:
        os.waitpid(pid, 0)
    else:
        time.sleep(0.1)
    assert take(tmp_path / LEASE, renew_seconds=10.0, stale_seconds=60.0) < 5
    if not is_collected:
        os.waitpid(pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_process_here_that_stands_still_loses_its_lease(tmp_path):
    pid = held_by_child(tmp_path / LEASE)
    with ending(pid):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        assert take(tmp_path / LEASE) < 5


CASES = {
    # a lease that is there, the job of who wants it, seconds it may take (None: refused)
    "old, elsewhere": ({"age": 1e6}, "", 0.2),
    "young, elsewhere, silent": ({}, "", 0.6),
    "touched in the future, silent": ({"age": -1e6}, "", 0.6),
    "the same job, later start": ({"job": "8"}, ("8", "1"), 0.05),
    "the same job, two later": ({"job": "8", "restarts": 3}, ("8", "5"), 0.05),
    "the same job, on one cluster": ({"job": "8 on big"}, ("8", "1", "big"), 0.05),
    "no lease of this release": ({"more": 1}, "", 0.6),
}


@pytest.mark.parametrize("name", CASES)
def test_a_silent_lease_is_taken_over_when_it_may_be(tmp_path, monkeypatch, name):
    facts, job, most = CASES[name]
    set_job(monkeypatch, job)
    write(tmp_path / LEASE, **facts)
    assert take(tmp_path / LEASE) < most + 2.0
    assert list(tmp_path.iterdir()) == []


def set_job(monkeypatch, job):
    for variable, value in zip(
        ("JOB_ID", "RESTART_COUNT", "CLUSTER_NAME"), [*job, "", "", ""][:3], strict=True
    ):
        monkeypatch.setenv(f"SLURM_{variable}", value)


@pytest.mark.parametrize(
    ("facts", "job"),
    [
        ({"job": "8"}, ("8",)),  # two steps of one job
        ({"job": "8", "restarts": 1}, ("8", "1")),
        ({"job": "8", "restarts": 2}, ("8", "1")),
        ({"job": "8"}, ("9", "1")),
        ({"job": "8 on big"}, ("8", "1", "small")),
        ({"job": ""}, ("", "1")),
        ({"age": 1e6}, ("8",)),  # by a clock far behind
        ({"age": -1e6}, ("8",)),  # by one far ahead
    ],
)
def test_a_lease_that_is_touched_elsewhere_is_living_whatever_the_clocks_say(
    tmp_path, monkeypatch, facts, job
):
    set_job(monkeypatch, job)
    path, shift = tmp_path / LEASE, facts.get("age", 0.0)
    write(path, **facts)

    def touch():
        for _ in range(200):
            time.sleep(0.03)
            os.utime(path, (time.time() - shift, time.time() - shift))

    with ending(child(touch)), pytest.raises(CheckpointError, match=r"in use by host elsewhere, pid 7"):
        take(path)
    assert [one.name for one in tmp_path.iterdir()] == [LEASE]


def test_the_job_is_read_from_slurm(monkeypatch):
    for variables, wanted in (
        (("", "2"), None),
        (("8",), ("8", 0)),
        (("8", "2"), ("8", 2)),
        (("8", "x", "big"), ("8 on big", 0)),
    ):
        set_job(monkeypatch, variables)
        job = read_job()
        assert (job and (job.name, job.restarts)) == wanted


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_lost_lease_is_heard_and_lets_nothing_be_committed(tmp_path, change):
    path, heard = tmp_path / LEASE, []
    with leased(path, "it", **FAST) as lease:
        lease.on_loss = heard.append
        if change == "replaced":
            write(tmp_path / "other")
            (tmp_path / "other").replace(path)
        else:
            path.unlink()
        with pytest.raises(
            CheckpointError, match="host elsewhere, pid 7" if change == "replaced" else "was removed"
        ):
            lease.check()
        time.sleep(0.3)
        assert heard == [f"the loss of {path}"]
    assert path.exists() == (change == "replaced"), "another one's lease is not given up for it"


def race(path, log, starts, offsets):
    """Start processes that take a lease, write begin and end of their work, and give it up or die."""
    pids = []
    for number, offset in zip(range(starts), offsets, strict=True):

        def work(number=number, offset=offset):
            time.sleep(offset)
            with leased(path, "it", **FAST):
                handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(handle, f"{number} begins\n".encode())
                time.sleep(0.05)
                os.write(handle, f"{number} ends\n".encode())

        pids.append(child(work))
    return [code_of(pid) for pid in pids]


@pytest.mark.parametrize("left", ["nothing", "a dead one's", "an old one's", "half of one"])
def test_of_starts_at_random_moments_one_at_a_time_proceeds(tmp_path, left):
    draw = random.Random(f"{left}7")
    for round_ in range(5):
        room = tmp_path / str(round_)
        path, log = room / LEASE, tmp_path / f"log{round_}"
        if left == "a dead one's":
            pid = held_by_child(path)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif left == "an old one's":
            write(path, age=1e6)
        elif left == "half of one":
            room.mkdir()
            path.write_text('{"tok')
        offsets = [draw.uniform(0, 0.03) for _ in range(4)]
        codes = race(path, log, 4, offsets)
        assert set(codes) <= {0, 2}
        lines = log.read_text().splitlines()
        assert len(lines) == 2 * codes.count(0) > 0
        for begun, ended in zip(lines[::2], lines[1::2], strict=True):
            assert (begun.split()[0], ended.split()[0]) == (begun.split()[0],) * 2, "two at a time"
        assert not room.exists() or list(room.iterdir()) == []


def test_folders_that_other_starts_remove_meanwhile_are_made_again(tmp_path):
    path = tmp_path / "a/b" / LEASE

    def remove():
        while True:
            time.sleep(0.0003)
            for folder in (path.parent, path.parent.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    with ending(child(remove)):
        for _ in range(200):
            take(path)


def test_a_file_system_without_links_does(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_a_living_holder_here_is_named_at_once(tmp_path)
    assert take(tmp_path / LEASE) < 5
    assert race(tmp_path / "r" / LEASE, tmp_path / "log", 3, [0.0, 0.0, 0.0]).count(0) >= 1


def test_what_killed_starts_left_is_tidied_and_stands_in_nobodys_way(tmp_path):
    path = tmp_path / LEASE
    write(path, age=1e6)
    for name in ("-abc", "-t.claim"):  # the second died while it took the lease over
        write(tmp_path / f"{LEASE}{name}", age=1e6)
    assert take(path) < 5
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_the_watch(tmp_path):
    stop = StopFlag()
    stop.request("SIGTERM")
    write(tmp_path / LEASE)
    with pytest.raises(TideError, match="stopped by SIGTERM while waiting for folder: run"):
        take(tmp_path / LEASE, stop=stop, stale_seconds=60.0)


def test_a_pid_that_another_process_has_now_is_a_dead_one():
    here = Holder.here(None)
    assert here.is_here(here)
    assert not here.is_gone(here)
    born_before = Holder(**{**vars(here), "process_start": "1"})
    assert born_before.is_gone(here)
    elsewhere = Holder(**{**vars(here), "machine": "another boot or container", "pid": 2**30})
    assert not elsewhere.is_gone(here), "its pids say nothing here"
    assert owner_module._process(2**30) == ("", "")
    assert lease_beside(Path("a/b")) == Path("a/.b.lease")
    assert (lease_module.RENEW_SECONDS, lease_module.STALE_SECONDS) == (10.0, 60.0)


def test_a_process_that_ends_without_unwinding_gives_the_lease_up_and_leaves_no_folder(tmp_path):
    stop = StopFlag()
    with leased(tmp_path / "new" / "run" / LEASE, "folder", stop=stop):
        (farewell,) = stop.farewells
        assert (tmp_path / "new/run" / LEASE).is_file()
        farewell()
        assert not (tmp_path / "new").exists()
        farewell()  # and the block's own end finds nothing left to do
    assert stop.farewells == []
