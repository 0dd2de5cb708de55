"""What isolates is found by trying; where nothing does, no program runs unless told so by name."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tide_megatron.tasks.sandbox import ground, sandbox
from tide_megatron.tasks.sandbox.errors import SandboxError
from tide_megatron.tasks.sandbox.ground import Ground, find_ground, ground_here
from tide_megatron.tasks.sandbox.sandbox import Sandbox


class Stub:
    """A process that answers the trial."""

    def __init__(self, answer):
        self._answer = answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def ask(self, request):
        return self._answer


def machine(answers):
    """A machine on which some kinds start, with these answers to the trial."""

    def starts(one):
        if (one.kind, one.is_filtered) not in answers:
            raise SandboxError("not allowed")
        return Stub({"output": answers[one.kind, one.is_filtered], "error": None})

    return starts


def test_the_strongest_that_works_is_taken():
    everything = machine({(kind, True): "" for kind in ("namespaces", "bubblewrap", "filters")})
    assert find_ground("auto", everything) == Ground(kind="namespaces", is_filtered=True)
    assert find_ground("filters", everything) == Ground(kind="filters", is_filtered=True)
    weak = machine({("namespaces", False): "", ("filters", True): ""})
    assert find_ground("auto", weak) == Ground(kind="namespaces", is_filtered=False)


def test_a_kind_that_lets_something_through_is_not_taken():
    leaky = machine({("namespaces", True): "reach_network", ("filters", True): ""})
    assert find_ground("auto", leaky).kind == "filters"


def test_nothing_runs_without_isolation_unless_told_by_name():
    with pytest.raises(SandboxError, match=r"not run without isolation.*not allowed.*isolation='none'"):
        find_ground("auto", machine({}))
    assert find_ground("none", machine({})).kind == "none"


def test_the_log_says_once_what_runs_and_what_it_does_not_stop(caplog, monkeypatch):
    monkeypatch.setattr(sandbox, "_said", set())
    with caplog.at_level(logging.INFO, logger="tide_megatron"):
        Sandbox()
        Sandbox()
        Sandbox("none")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sandbox:")]
    assert len(lines) == 2
    assert re.search("not kept out", lines[0])
    assert re.search("limits of resources alone", lines[1])


def test_a_fault_of_the_sandbox_is_no_fault_of_the_program(monkeypatch):
    here = Sandbox()
    monkeypatch.setattr(ground, "INSIDE", "/nowhere")
    with pytest.raises(SandboxError, match="nowhere"):
        here.open()


CALLER = """
import os, sys
from tide_megatron.tasks.sandbox.sandbox import Sandbox
process = Sandbox(sys.argv[1]).open()
print(process._process.pid, flush=True)
process.ask({"run": "while True: pass"})
"""


def group_of(leader):
    """Return the processes of a group: their numbers in this machine."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat") as file:
                words = file.read().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if words[2] == leader and words[0] != "Z":
            found.append(name)
    return found


@pytest.mark.parametrize("kind", ["namespaces", "filters"])
def test_programs_die_with_a_caller_that_is_killed(kind):
    try:
        ground_here(kind)
    except SandboxError as fault:
        pytest.skip(str(fault))
    caller = subprocess.Popen([sys.executable, "-c", CALLER, kind], stdout=subprocess.PIPE, text=True)
    leader = caller.stdout.readline().strip()
    assert group_of(leader)
    caller.send_signal(signal.SIGKILL)
    caller.communicate()
    deadline = time.monotonic() + 8  # before its own limit of time would end it
    while group_of(leader) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert group_of(leader) == []
