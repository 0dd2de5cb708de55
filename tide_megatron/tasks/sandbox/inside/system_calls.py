"""A filter of system calls for this process (seccomp), written as the BPF program that the kernel reads.

It refuses what a program that only computes never needs: to start processes or threads, to open sockets, to
look into or signal other processes, to mount, to change clocks, hosts or the kernel, to get memory that no
limit counts. Calls newer than the table are told not to exist, for nobody has read here what they do. Without
namespaces it also refuses to open anything for writing and to change the file system at all.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Iterable, Sequence

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of each, in the order of the columns below."""
_NEWEST = 450
_X32 = 0x40000000
"""Calls of x86-64's second ABI begin here."""

_ALWAYS = """
fork 57 -, vfork 58 -, clone 56 220, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154,
socket 41 198, bind 49 200, connect 42 203, listen 50 201,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
kcmp 312 272, pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, move_mount 429 429,
open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
unshare 272 97, setns 308 268, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, keyctl 250 219,
add_key 248 217, request_key 249 218, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105,
finit_module 313 273, delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225,
quotactl 179 60, quotactl_fd 443 443, acct 163 89, syslog 103 116, settimeofday 164 170,
clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, iopl 172 -, ioperm 173 -, modify_ldt 154 -,
personality 135 92, memfd_create 319 279, memfd_secret 447 447, shmget 29 194, semget 64 190, msgget 68 186,
mq_open 240 180, open_by_handle_at 304 265, name_to_handle_at 303 264, fanotify_init 300 262, mknod 133 -,
mknodat 259 33, vhangup 153 58, sethostname 170 161, setdomainname 171 162, ioprio_set 251 30,
sched_setscheduler 144 119, sched_setattr 314 274, sched_setparam 142 118, sched_setaffinity 203 122,
setpriority 141 140, migrate_pages 256 238, move_pages 279 239, process_mrelease 448 448,
inotify_init 253 -, inotify_init1 294 26
"""
_ABSENT = "clone3 435 435, openat2 437 437"
"""Their arguments lie in memory, where no filter looks; the C library falls back on the older calls."""
_CHANGES = """
creat 85 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, truncate 76 45,
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -, setxattr 188 5, lsetxattr 189 6,
fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16
"""
"""What changes the file system without opening a file."""
_SIGNALS = "kill 62 129, tkill 200 130, tgkill 234 131"
"""A program may signal itself."""
_LIMITS = "prlimit64 302 261"
"""And limit itself; without namespaces another process of the same user could be limited to nothing."""
_PAIRS, _STREAM = "socketpair 53 199", socket.SOCK_STREAM | socket.SOCK_CLOEXEC
"""Two ends of a stream inside a process are harmless; one of datagrams can be sent anywhere."""
_CONTROLS = (
    ("fcntl 72 25", (fcntl.F_SETOWN, fcntl.F_SETSIG, 15, 1031)),
    ("ioctl 16 29", (0x8901, 0x8902, 0x5412)),
)
"""Controls of open files that send signals to whom they like (`F_SETOWN`, `F_SETOWN_EX`, `F_SETSIG`,
`FIOSETOWN`, `SIOCSPGRP`), take the user's memory for pipes (`F_SETPIPE_SZ`), or type into a terminal
(`TIOCSTI`)."""
_OPENS = (("open 2 -", 1), ("openat 257 56", 2))
"""Which argument of each holds the flags."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`; an argument's low half comes first on both architectures."""
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Code, steps to skip when true, when false, operand."""


class NoFilter(Exception):
    """The kernel or the processor does not have it; says which."""


def forbid(*, writing: bool) -> None:
    """Put this process, for good, under the filter.

    Args:
        writing: also refuse to open files for writing and to change the file system.

    Raises:
        NoFilter: this architecture is not in the table, or the kernel has no filters.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise NoFilter(f"the numbers of {machine}'s system calls are not in the table")
    program = _program(machine, writing=writing)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(memory))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.c_char_p(header), 0, 0
    ):
        raise NoFilter(f"the kernel refuses a filter of system calls ({os.strerror(ctypes.get_errno())})")


def _program(machine: str, *, writing: bool) -> list[Instruction]:
    column = [*_ARCHITECTURES].index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    program += [(_AT_LEAST, 0, 1, _NEWEST + 1), _refuse(errno.ENOSYS)]
    program += _answers(_numbers(_ALWAYS, column), errno.EPERM)
    program += _answers(_numbers(_ABSENT, column), errno.ENOSYS)
    for number in _numbers(_SIGNALS, column):
        program += _only(number, 0, (os.getpid(),))
    for number in _numbers(_LIMITS, column):
        program += _only(number, 0, (0, os.getpid()))
    for number in _numbers(_PAIRS, column):
        program += _only(number, 1, (_STREAM,))
    for entry, controls in _CONTROLS:
        for number in _numbers(entry, column):
            tests = [(_EQUAL, 0, 1, control) for control in controls]
            program += _look(number, 1, [step for test in tests for step in (test, _refuse(errno.EPERM))])
    if writing:
        program += _answers(_numbers(_CHANGES, column), errno.EROFS)
        for entry, argument in _OPENS:
            for number in _numbers(entry, column):
                program += _look(number, argument, [(_ANY_BIT, 0, 1, _WRITING), _refuse(errno.EROFS)])
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _numbers(table: str, column: int) -> list[int]:
    entries = [entry.split() for entry in table.replace("\n", " ").split(",")]
    return [int(entry[1 + column]) for entry in entries if entry[1 + column] != "-"]


def _refuse(fault: int) -> Instruction:
    return (_RETURN, 0, 0, _REFUSE | fault)


def _answers(numbers: Iterable[int], fault: int) -> list[Instruction]:
    return [step for number in numbers for step in ((_EQUAL, 0, 1, number), _refuse(fault))]


def _only(number: int, argument: int, values: Sequence[int]) -> list[Instruction]:
    """Refuse a call unless an argument has one of some values."""
    left = range(len(values), 0, -1)
    tests = [(_EQUAL, steps, 0, value) for steps, value in zip(left, values, strict=True)]
    return _look(number, argument, [*tests, _refuse(errno.EPERM)])


def _look(number: int, argument: int, steps: Sequence[Instruction]) -> list[Instruction]:
    """Take steps for one call with an argument's low half at hand, and go on with the number behind them."""
    return [
        (_EQUAL, 0, len(steps) + 2, number),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        *steps,
        (_LOAD, 0, 0, _NUMBER),
    ]
