"""What a process gives up before it runs a program: resources, privileges, and the sight of files."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Mapping, Sequence

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPABILITIES_VERSION = 0x20080522
_NOBODY = 65534
_KILL_SIGNAL = 9

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_ACCESSES_BY_VERSION = (0, 13, 14, 15)
"""How many kinds of access to files each version of Landlock knows; later ones add none that matter here."""
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library.

    Raises:
        OSError: it said -1; names the function.
    """
    result: int = getattr(_LIBRARY, name)(*arguments)
    if result == -1:
        fault = ctypes.get_errno()
        raise OSError(fault, f"{name}: {os.strerror(fault)}")
    return result


def limit(limits: Mapping[str, int]) -> None:
    """Set hard limits of resources; what is open or running already stays.

    Args:
        limits: `cpu_seconds`, `memory_bytes`, `file_bytes`, `open_files`.
    """
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))
    # A second behind the limit whose signal says what happened comes the one that nobody can ignore.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    call("prctl", _PR_SET_PDEATHSIG, _KILL_SIGNAL, 0, 0, 0)


def hide_memory() -> None:
    """Let no process of this user look into this one."""
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def become_nobody() -> None:
    """Stop being root. Only for who is."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def drop_privileges() -> None:
    """Give up every capability, those of an own user namespace too, and ever getting one again."""
    for number in range(64):
        if _LIBRARY.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == -1:
            break
    call("capset", struct.pack("=Ii", _CAPABILITIES_VERSION, 0), struct.pack("=6I", *[0] * 6))
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def landlock_version() -> int:
    """Return which Landlock the kernel has; 0: none."""
    return max(0, int(_LIBRARY.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)))


def see_only(folders: Sequence[str]) -> None:
    """Let this process, for good, read below some folders and do nothing else with files (Landlock).

    Args:
        folders: files or folders that may be read; those that do not exist are left out.

    Raises:
        OSError: the kernel has no Landlock.
    """
    kinds = _ACCESSES_BY_VERSION[min(landlock_version(), len(_ACCESSES_BY_VERSION) - 1)]
    rules = call("syscall", _CREATE_RULESET, struct.pack("=Q", (1 << kinds) - 1), 8, 0)
    for folder in folders:
        try:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = _READ_FILE | (_READ_FOLDER if os.path.isdir(folder) else 0)
        call("syscall", _ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("syscall", _RESTRICT_SELF, rules, 0)
    os.close(rules)
