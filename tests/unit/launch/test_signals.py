"""Stop signals: the first is a request, echoes belong to it, a later one is the end, nothing leaks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tide_megatron.launch import signals
from tide_megatron.launch.signals import STOP_SIGNALS, release_signals, signals_held, watch_signals

TWICE = """
import os, signal, sys, time
from tide_megatron.launch import signals
signals.ECHO_SECONDS = float(sys.argv[1])
with signals.watch_signals() as stop:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
    print(stop.reason)
"""


DEAF = """
import datetime, os, signal, sys, threading, time
from torch._C._distributed_c10d import HashStore
from tide_megatron.launch import signals
signals.ECHO_SECONDS = signals.DEAF_SECONDS = 0.1
def ask():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
with signals.watch_signals() as stop:
    threading.Thread(target=ask).start()
    HashStore().wait(["never"], datetime.timedelta(seconds=50))
"""


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
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # an echo
        assert stop.reason == number.name
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


@pytest.mark.parametrize(
    ("echo_seconds", "code", "said"), [("5", 0, "SIGINT\n"), ("0.1", -signal.SIGINT, "")]
)
def test_a_second_signal_is_an_echo_at_first_and_the_end_later(echo_seconds, code, said):
    done = subprocess.run(
        [sys.executable, "-c", TWICE, echo_seconds], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, said)


def test_a_second_signal_ends_a_process_that_stands_in_a_library():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DEAF], check=False, capture_output=True, timeout=100)
    assert done.returncode in (128 + signal.SIGINT, -signal.SIGINT), done.stderr
    assert time.monotonic() - began < 40


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
        with watch_signals() as stop:
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
    with watch_signals() as stop:
        with signals_held():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            assert not stop.requested
        assert stop.reason == "SIGTERM"
    with watch_signals() as stop, signals_held():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        release_signals()
        assert stop.reason == "SIGTERM"


def test_signals_need_no_torch():
    code = "import sys, tide_megatron.launch.signals; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"
    assert signals.ECHO_SECONDS == 2.0
