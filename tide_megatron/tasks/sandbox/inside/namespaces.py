"""Own namespaces: an empty network, its own processes, and a file system that holds Python and nothing else.

The new root is a small read-only tmpfs. The interpreter's folders are bound into it, read-only, at the paths
where they lie outside; packages installed beside it are covered. The one place to write is the working
folder, a tmpfs of bounded size and number of files in memory. There is no /proc, no /dev, no home.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from tide_megatron.tasks.sandbox.inside.confine import call

WORK = "/work"
_NEW_USER, _NEW_REST = 0x10000000, 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""CLONE_NEWUSER; of mounts, processes, network, IPC and host names."""
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_RUNNING, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_KEPT = _NO_SETUID | _NO_DEVICES | _NO_RUNNING
"""Flags of a mount that an own user namespace may not take back."""
_DETACH = 2
_OLD = "/old"
_ESCAPE = re.compile(r"\\([0-7]{3})")
"""How the kernel writes blanks in paths."""


def leave() -> bool:
    """Take new namespaces; the next process that is started is the first one of its own kind.

    Returns:
        Whether root's own rights did it; if not, an own user namespace did.

    Raises:
        OSError: neither is allowed.
    """
    if os.geteuid() == 0:
        try:
            call("unshare", _NEW_REST)
            return True
        except PermissionError:
            pass
    user, group = os.geteuid(), os.getegid()
    call("unshare", _NEW_USER | _NEW_REST)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)
    return False


def enter_root(shown: Sequence[str], covered: Sequence[str], work_bytes: int, work_files: int) -> None:
    """Change into a file system that holds only what is shown, and a working folder, which becomes current.

    Args:
        shown: files and folders; links are made again as links. Those that do not exist are left out.
        covered: folders below these that must look empty.
        work_bytes: room of the working folder.
        work_files: most files in it.
    """
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NO_SETUID | _NO_DEVICES, "size=256k,nr_inodes=256,mode=755")
    os.mkdir("/tmp" + _OLD)
    call("pivot_root", b"/tmp", b"/tmp" + _OLD.encode())
    os.chdir("/")
    for path in shown:
        _show(path)
    for path in covered:
        if os.path.isdir(path):
            _mount(
                "tmpfs", path, "tmpfs", _READ_ONLY | _NO_SETUID | _NO_DEVICES, "size=4k,nr_inodes=2,mode=755"
            )
    os.mkdir(WORK)
    room = f"size={work_bytes},nr_inodes={work_files},mode=777"
    _mount("tmpfs", WORK, "tmpfs", _NO_SETUID | _NO_DEVICES | _NO_RUNNING, room)
    call("umount2", _OLD.encode(), _DETACH)
    os.rmdir(_OLD)
    _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES)
    os.chdir(WORK)


def _show(path: str) -> None:
    """Bind a path of the old root, read-only, at its place in the new one."""
    source = _OLD + path
    if not os.path.lexists(source) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path, 0o755)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, path, None, _BIND | _RECURSIVE)
    for place in _mounts_below(path):
        kept = os.statvfs(place).f_flag & _KEPT
        _mount(None, place, None, kept | _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES)


def _mounts_below(path: str) -> list[str]:
    """Return where file systems are mounted at a path and below."""
    with open(f"{_OLD}/proc/self/mountinfo", encoding="utf-8") as file:
        places = [_ESCAPE.sub(lambda found: chr(int(found[1], 8)), line.split()[4]) for line in file]
    return [place for place in places if place == path or place.startswith(path + "/")]


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        words = [None if word is None else word.encode() for word in (source, target, kind)]
        call("mount", *words, flags, options.encode())
    except OSError as fault:
        raise OSError(fault.errno, f"{fault.strerror} on {target}") from None
