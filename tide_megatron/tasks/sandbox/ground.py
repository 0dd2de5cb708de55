"""What can keep a program in place on this machine, found by trying and not by the names of things."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable

from tide_megatron.tasks.sandbox.errors import SandboxError
from tide_megatron.tasks.sandbox.inside import confine
from tide_megatron.tasks.sandbox.interpreter import INSIDE, Interpreter, find_interpreter
from tide_megatron.tasks.sandbox.options import Isolation, Kind, Limits
from tide_megatron.tasks.sandbox.process import Confined, Ended

_IN_ORDER: tuple[Kind, ...] = ("namespaces", "bubblewrap", "filters")
_PROBE = """
import os, socket
held = []
def expect(fault, action):
    try:
        action()
        held.append(action.__name__)
    except fault:
        pass
def start_process():
    if not os.fork():
        os._exit(0)
def reach_network():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.connect(("192.0.2.1", 9))
def write_outside():
    home = os.path.expanduser("~")
    with open(os.path.join(home if os.path.isabs(home) else "/", ".tide-sandbox-trial"), "x"):
        pass
for action in (start_process, reach_network, write_outside):
    expect(OSError, action)
print(",".join(held), end="")
"""
"""Prints what it could do and should not; what it writes outside would be an empty file of this name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """A kind of isolation that works here."""

    kind: Kind
    is_filtered: bool
    """Whether system calls are filtered."""

    def weakness(self) -> str:
        """Say what it does not stop, for the log."""
        if self.kind == "none":
            return (
                "limits of resources alone: a program reads, writes and deletes what this user may, "
                "uses the network and signals this user's processes"
            )
        said = []
        if self.kind == "filters":
            said.append("it sees names of files and which processes there are")
            if not confine.landlock_version():
                said.append("reads what this user may (no Landlock)")
        if not self.is_filtered:
            said.append("calls of the kernel are not filtered")
        return "; ".join([*said, "faults of the kernel and of the processor are not kept out"])


def open_process(ground: Ground, limits: Limits) -> Confined:
    """Start a confined process that waits for programs.

    Raises:
        SandboxError: it does not start; names why.
    """
    interpreter = find_interpreter()
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        told = {
            "kind": ground.kind,
            "is_filtered": ground.is_filtered,
            "shown": interpreter.shown,
            "covered": interpreter.covered,
            "readable": interpreter.readable() if ground.kind == "filters" else [],
            "nowhere": nowhere,
            "work_bytes": limits.work_mib << 20,
            "work_files": limits.work_files,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_mib << 20,
            "file_bytes": limits.work_mib << 20,
            "open_files": limits.open_files,
            "output_characters": limits.output_characters,
        }
        command = [interpreter.program, "-I", "-S", "-B", INSIDE, json.dumps(told)]
        if ground.kind == "bubblewrap":
            command = [*_bubblewrap(interpreter), *command]
        return Confined(
            command,
            nowhere=nowhere,
            cpu_seconds=limits.cpu_seconds,
            wall_seconds=limits.wall_seconds,
            is_watched=ground.kind == "namespaces",
        )
    finally:
        os.close(nowhere)


def _bubblewrap(interpreter: Interpreter) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not installed")
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", "65534", "--gid", "65534"]
    for path in (*interpreter.shown, INSIDE):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    for path in interpreter.covered:
        words += ["--tmpfs", path, "--remount-ro", path]
    return [*words, "--remount-ro", "/", "--chdir", "/"]


def find_ground(isolation: Isolation, starts: Callable[[Ground], Confined] | None = None) -> Ground:
    """Return what works here, as asked.

    Args:
        isolation: `auto` takes the first that works; another word insists.
        starts: how to open a process on it; None: `open_process` with the usual limits.

    Raises:
        SandboxError: nothing asked for works; says why of each, and what to do.
    """
    starts = starts or (lambda ground: open_process(ground, Limits()))
    if isolation == "none":
        return Ground(kind="none", is_filtered=False)
    faults = []
    for kind in _IN_ORDER if isolation == "auto" else (isolation,):
        for is_filtered in (True, False) if kind != "filters" else (True,):
            ground = Ground(kind=kind, is_filtered=is_filtered)
            fault = _fault_of(ground, starts)
            if fault is None:
                return ground
            faults.append(f"{kind}{'' if is_filtered else ' without a filter of system calls'}: {fault}")
    raise SandboxError(
        f"programs that a model wrote are not run without isolation, and isolation={isolation!r} does not "
        f"work here ({'; '.join(faults)}); allow user namespaces, install bubblewrap or take another "
        "machine, or say --unsandboxed TASK (isolation='none') to run them with limits of resources alone"
    )


def _fault_of(ground: Ground, starts: Callable[[Ground], Confined]) -> str | None:
    """Return why a kind does not keep a program in place here; None: it does."""
    try:
        with starts(ground) as process:
            answer = process.ask({"run": _PROBE})
    except SandboxError as fault:
        return str(fault)
    except Ended as fault:
        return f"the trial ended: {fault}"
    if answer.get("error"):
        return f"the trial failed: {answer['error']}"
    return f"the trial could {answer['output']}" if answer.get("output") else None


@functools.lru_cache(maxsize=8)
def ground_here(isolation: Isolation) -> Ground:
    """Return `find_ground`, tried once in a process.

    Raises:
        SandboxError: as there.
    """
    return find_ground(isolation)
