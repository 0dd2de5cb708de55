"""A file system that answers as a busy file server does: every read takes its time, many may be under way.

It shows one folder, read-only, through the kernel's FUSE interface, spoken here directly (no library), in a
process of its own: a rank that touches a mapped page must not wait for itself. Linux, root. Only what reading
weights needs is answered. The kernel reads 128 KiB ahead, as NFS does unless its administrator says more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_REQUEST, _REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_SECONDS = 3600  # for which the kernel may believe names and sizes
_READ_ONLY, _DETACH = 1 | 2 | 4, 2
_ASYNC_READ, _MAX_PAGES, _KEEP_CACHE = 1 << 0, 1 << 22, 2
_THREADS = 64  # requests that are answered at once


@contextlib.contextmanager
def slow_view(folder: Path, latency_seconds: float, bytes_per_second: float) -> Iterator[SlowView]:
    """Show a folder at another place, slowly.

    Args:
        folder: what is shown.
        latency_seconds: from a read's request to its answer, at least.
        bytes_per_second: of all reads together, at most.
    """
    served = multiprocessing.Value("q", 0)
    with tempfile.TemporaryDirectory() as place:
        ready = multiprocessing.Event()
        server = multiprocessing.Process(
            target=_serve, args=(str(folder), place, latency_seconds, bytes_per_second, served, ready)
        )
        server.start()
        try:
            if not ready.wait(20):
                raise RuntimeError("the slow file system did not come up; it needs Linux, root and /dev/fuse")
            yield SlowView(Path(place), served)
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(place), _DETACH)
            server.kill()
            server.join()


class SlowView:
    """Where the folder is seen, and what was read there."""

    def __init__(self, folder: Path, served: Any) -> None:
        self.folder, self._served = folder, served

    @property
    def bytes_served(self) -> int:
        """Bytes that the kernel has asked for so far."""
        return int(self._served.value)


def _serve(folder: str, place: str, latency: float, rate: float, served: Any, ready: Any) -> None:
    """Mount, and answer until killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={handle},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"slow", os.fsencode(place), b"fuse.slow", ctypes.c_ulong(_READ_ONLY), options):
        raise OSError(ctypes.get_errno(), "mount")
    server = _Server(handle, folder, latency, rate, served)
    threads = [threading.Thread(target=server.answer) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    ready.set()
    for thread in threads:
        thread.join()


class _Server:
    """Answers the kernel's requests; each thread takes one after the other."""

    def __init__(self, handle: int, folder: str, latency: float, rate: float, served: Any) -> None:
        self.handle, self.latency, self.rate, self.served = handle, latency, rate, served
        self.paths = {1: folder}
        self.numbers = {folder: 1}
        self.lock = threading.Lock()
        self.free_at = 0.0  # when the line to the server has sent all that was asked for
        self.answers: dict[int, Callable[[int, bytes], bytes | None]] = {
            **{1: self.look_up, 3: self.attributes, 14: self.open, 15: self.read, 18: self.close},
            **{26: self.begin, 27: self.open_folder, 28: self.list, 29: lambda *_: b"", 25: lambda *_: b""},
            **{2: lambda *_: None, 36: lambda *_: None, 42: lambda *_: None},
        }

    def answer(self) -> None:
        """Take requests until the view is gone."""
        while True:
            try:
                request = os.read(self.handle, 1 << 21)
            except OSError as fault:
                if fault.errno == errno.ENODEV:
                    return
                continue
            _, kind, unique, node, *_ = _REQUEST.unpack_from(request)
            fault_number, said = 0, b""
            try:
                known = self.answers.get(kind)
                found = known(node, request[_REQUEST.size :]) if known else b""
                if found is None:
                    continue
                fault_number, said = (0, found) if known else (errno.ENOSYS, b"")
            except OSError as fault:
                fault_number = fault.errno or errno.EIO
            with contextlib.suppress(OSError):
                os.writev(self.handle, [_REPLY.pack(_REPLY.size + len(said), -fault_number, unique), said])

    def begin(self, _: int, body: bytes) -> bytes:
        """Agree on what either side can do."""
        _, _, ahead, flags = struct.unpack_from("<IIII", body)
        wanted = flags & (_ASYNC_READ | _MAX_PAGES)
        return struct.pack("<IIIIHHIIHHI6I", 7, 31, ahead, wanted, 64, 48, 1 << 20, 1, 256, 0, 0, *[0] * 6)

    def look_up(self, node: int, body: bytes) -> bytes:
        """Give a name of a folder a number."""
        path = f"{self.paths[node]}/{os.fsdecode(body.split(bytes(1))[0])}"
        about = os.stat(path)
        with self.lock:
            number = self.numbers.setdefault(path, len(self.numbers) + 1)
            self.paths[number] = path
        return struct.pack("<QQQQII", number, 0, _SECONDS, _SECONDS, 0, 0) + _attributes(number, about)

    def attributes(self, node: int, _: bytes) -> bytes:
        """Tell size and kind."""
        return struct.pack("<QII", _SECONDS, 0, 0) + _attributes(node, os.stat(self.paths[node]))

    def open(self, node: int, _: bytes) -> bytes:
        """Open a file; what the kernel has of it stays good."""
        return struct.pack("<QII", os.open(self.paths[node], os.O_RDONLY), _KEEP_CACHE, 0)

    def open_folder(self, _node: int, _: bytes) -> bytes:
        """Open a folder."""
        return struct.pack("<QII", 0, 0, 0)

    def close(self, _: int, body: bytes) -> bytes:
        """Close a file."""
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def read(self, _: int, body: bytes) -> bytes:
        """Read, when the line is free, and not before the latency has passed."""
        handle, place, size = struct.unpack_from("<QQI", body)
        with self.lock:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + size / self.rate
            due = max(self.free_at, now + self.latency)
            self.served.value += size
        found = os.pread(handle, size, place)
        time.sleep(max(0.0, due - time.monotonic()))
        return found

    def list(self, node: int, body: bytes) -> bytes:
        """List a folder from an entry on."""
        _, first, size = struct.unpack_from("<QQI", body)
        said = b""
        for number, name in enumerate(sorted(os.listdir(self.paths[node]))):
            spelled = os.fsencode(name)
            entry = struct.pack("<QQII", 1000 + number, number + 1, len(spelled), 8) + spelled
            entry += bytes(-len(entry) % 8)
            if number >= first:
                if len(said) + len(entry) > size:
                    break
                said += entry
        return said


def _attributes(number: int, about: os.stat_result) -> bytes:
    times = (int(about.st_atime), int(about.st_mtime), int(about.st_ctime))
    return struct.pack(
        "<6Q10I",
        number,
        about.st_size,
        about.st_blocks,
        *times,
        *(0, 0, 0),
        about.st_mode,
        1,
        0,
        0,
        0,
        4096,
        0,
    )
