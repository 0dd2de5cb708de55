"""Stop signals: the first is a request, echoes belong to it, a later one is the end, nothing leaks."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tide_megatron.base.stop import Stopped
from tide_megatron.launch import signals
from tide_megatron.launch.signals import STOP_SIGNALS, release_signals, signals_held, watch_signals

CHILD = """
import ctypes, sys, time
from tide_megatron.base.log import start_log
from tide_megatron.base.stop import is_stop
from tide_megatron.launch import signals
start_log()
block, wait = sys.argv[1:3]
signals.AGENT_ECHO_SECONDS = 30.0
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
def deaf():
    # Waits as torch does: in a library's call without the interpreter's lock, woken by no signal.
    library.pthread_mutex_lock(mutex)
def heard():
    while True:
        time.sleep(0.05)
with signals.watch_signals() as stop:
    inside = {"unwind": signals.contextlib.nullcontext, "end": stop.ending}.get(block)
    try:
        with inside() if inside else stop.finishing("the step is saved"):
            print("ready", flush=True)
            {"deaf": deaf, "heard": heard}[wait]()
    except BaseException as error:
        print("unwound", is_stop(error), flush=True)
        signals.leave(signals.stopped_code())
"""
"""A small process that stands in one kind of block and hears signals in its main thread or does not."""


class Child:
    """One such process, and what it said when."""

    def __init__(self, block, wait, **variables):
        left_out = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, block, wait],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "COLUMNS": "200", **variables},
        )
        assert self.process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # until it waits

    def heard(self, number, within=5.0):
        """Send a signal; return the first word about it. A second is promised; tests share two busy cores."""
        self.process.send_signal(number)
        began = time.monotonic()
        words = self.process.stderr.readline()
        assert time.monotonic() - began < within
        return words

    def end(self, within):
        """Return exit code and what was said after the first line."""
        out, said = self.process.communicate(timeout=within)
        return self.process.returncode, out, said


@pytest.fixture
def heard_hangups():
    """Have SIGHUP heard even where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangups")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_raises_the_flag_and_handlers_are_put_back(number):
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with watch_signals() as stop:
        with stop.finishing("it is saved"):
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.reason == number.name
            os.kill(os.getpid(), signal.SIGTERM)  # an echo
            assert stop.reason == number.name
        with watch_signals() as inner:
            assert inner is stop
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_a_request_that_comes_after_the_last_save_changes_nothing():
    with watch_signals() as stop:
        with stop.finishing("it is saved", is_last=True):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"
    with watch_signals() as stop:
        with contextlib.suppress(OSError), stop.finishing("it is saved", is_last=True):
            raise OSError("nothing was saved")
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_unwinds_what_has_nothing_to_save_and_the_next_does_not(number):
    def stand():
        os.kill(os.getpid(), number)
        pytest.fail("it goes on")

    unwound = []
    with watch_signals() as stop:
        try:
            with pytest.raises(Stopped, match=rf"^stopped by {number.name}$"), stop.ending():
                stand()
            os.kill(os.getpid(), number)  # an echo, into what unwinds
        finally:
            unwound.append(stop.answer)
    assert unwound == ["end"]


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, None), (signal.SIGINT, 128 + signal.SIGINT)])
def test_in_a_job_of_slurms_only_a_second_ctrl_c_ends_at_once(second, code):
    child = Child("finish", "heard", SLURM_JOB_ID="7")
    assert "the step is saved; Ctrl-C ends at once" in child.heard(signal.SIGUSR1)
    time.sleep(2 * signals.ECHO_SECONDS)
    child.process.send_signal(second)
    time.sleep(0.5 if code is None else 0)
    if code is None:
        assert child.process.poll() is None
        child.process.kill()
    assert child.end(10)[0] == (-signal.SIGKILL if code is None else code)


@pytest.mark.parametrize(
    ("block", "wait", "number"),
    [
        ("unwind", "heard", signal.SIGINT),
        ("unwind", "deaf", signal.SIGTERM),
        ("end", "heard", signal.SIGTERM),
        ("end", "deaf", signal.SIGINT),
        ("finish", "heard", signal.SIGINT),
        ("finish", "deaf", signal.SIGTERM),
    ],
)
def test_a_signal_is_acknowledged_in_a_second_and_two_end_any_process(block, wait, number):
    child = Child(block, wait)
    said = child.heard(number)
    assert f"{number.name} heard: " in said
    assert ("the step is saved" if block == "finish" else "nothing has to be saved") in said
    if block == "finish" or (block, wait) == ("unwind", "deaf"):
        time.sleep(signals.ECHO_SECONDS + 0.1)
        assert f"{number.name} heard again: ending at once" in child.heard(number)
        assert child.end(20)[:2] == (128 + number, "")
    elif wait == "heard":
        assert child.end(20)[:2] == (signals.STOPPED_CODE, "unwound True\n")
    else:
        assert child.end(20)[:2] == (signals.STOPPED_CODE, "")


def test_under_torchrun_an_orderly_end_is_0_and_echoes_may_come_later():
    child = Child("finish", "deaf", TORCHELASTIC_RUN_ID="none")
    child.heard(signal.SIGINT)
    time.sleep(2 * signals.ECHO_SECONDS)
    child.process.send_signal(signal.SIGINT)  # passed on by the agent
    time.sleep(0.5)
    assert child.process.poll() is None
    child.process.kill()
    assert "again" not in child.end(20)[2]
    child = Child("end", "deaf", TORCHELASTIC_RUN_ID="none")
    child.heard(signal.SIGTERM)
    assert child.end(20)[0] == 0


AGENT = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
child.wait()
"""


def test_ranks_that_torchruns_agent_left_behind_end():
    command = [sys.executable, "-c", AGENT, sys.executable, "-c", CHILD, "end", "heard"]
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    )
    assert agent.stdout.readline().strip().isdigit()
    assert agent.stdout.readline() == "ready\n"
    agent.kill()
    assert agent.communicate(timeout=20)[0] == "unwound True\n"


def test_a_forked_child_hears_for_itself():
    with watch_signals() as stop, stop.finishing("it is saved"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stop.requested


def test_the_wake_up_descriptor_is_put_back():
    threads = threading.active_count()
    for _ in range(20):
        with watch_signals():
            pass
    assert signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watch_signals() as stop, stop.finishing("it is saved"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_hears_nothing_and_breaks_nothing():
    flags = []

    def watch():
        with watch_signals() as stop:
            flags.append(stop.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert flags == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_held_signals_come_later_and_are_not_lost():
    with watch_signals() as stop, stop.finishing("it is saved"):
        with signals_held():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            assert not stop.requested
        assert stop.reason == "SIGTERM"
    with watch_signals() as stop, stop.finishing("it is saved"), signals_held():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        release_signals()
        assert stop.reason == "SIGTERM"


def test_signals_need_no_torch():
    code = "import sys, tide_megatron.launch.signals; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
