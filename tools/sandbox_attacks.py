"""Programs that try to get out of the sandbox, and what became of each, as a table.

    python tools/sandbox_attacks.py [namespaces bubblewrap filters]

Tests run the same programs (`tests/unit/tasks/sandbox/test_attacks.py`). Each prints what it got, or ends
as it must; `{place}` stands for a folder of the caller's with a file in it, `{port}` for a port that listens
here, `{socket}` for a Unix socket, `{pid}` for the caller.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.tasks.sandbox.errors import SandboxError
from tide_megatron.tasks.sandbox.options import Limits
from tide_megatron.tasks.sandbox.process import Ended
from tide_megatron.tasks.sandbox.sandbox import Sandbox

LIMITS = Limits(cpu_seconds=2, wall_seconds=20, memory_mib=256)
TRY = """
import os
def attempt(action):
    try:
        return action()
    except BaseException as fault:
        return type(fault).__name__
def write(path):
    with open(path, "w") as file:
        file.write("x")
    return "wrote"
def read(path):
    with open(path) as file:
        return file.read()
"""


@dataclasses.dataclass(frozen=True)
class Attack:
    """A program, and what may come of it: a pattern for all it prints, or for how it ends."""

    name: str
    source: str
    expected: str
    slow: bool = False
    """It takes the time it is given."""


_REFUSED = "(PermissionError|OSError|FileNotFoundError|RuntimeError|gaierror|ProcessLookupError)"

_TIME = "2 s of processor time|20 s of time"
"""The second where the machine is so busy that it comes first."""


def _times(count: int) -> str:
    return " ".join([_REFUSED] * count)


ATTACKS = (
    Attack("fork bomb", "while True: os.fork()", "PermissionError"),
    Attack("threads", "import threading\nwhile True: threading.Thread(target=print).start()", "start new"),
    Attack("a shell", "import subprocess; subprocess.run(['sh', '-c', 'id'])", "PermissionError"),
    Attack("10 GB at once", "bytearray(10**10)", "MemoryError"),
    Attack("10 GB by and by", "held = []\nwhile True: held.append(bytearray(2**20))", "MemoryError"),
    Attack("10 GB in a file without a name", "os.ftruncate(os.memfd_create('x'), 10**10)", "PermissionError"),
    Attack("endless loop", "while True: pass", _TIME, slow=True),
    Attack(
        "endless loop that ignores signals",
        """
import signal
for number in range(1, 65):
    attempt(lambda: signal.signal(number, signal.SIG_IGN))
while True: pass
""",
        f"killed by SIGKILL|{_TIME}",
        slow=True,
    ),
    Attack("sleep", "import time; time.sleep(10**6)", "20 s of time", slow=True),
    Attack(
        "deletes the home folder and all else",
        """
import shutil
for path in (os.path.expanduser('~'), '/root', '/home', '{place}', '/'):
    shutil.rmtree(path, ignore_errors=True)
print(os.path.isdir('/usr/lib'))
""",
        f"^True$|{_TIME}",
        slow=True,
    ),
    Attack(
        "deletes the home folder",
        """
import shutil
for path in ('{place}', os.path.expanduser('~'), '/root', '/home'): shutil.rmtree(path, ignore_errors=True)
print('did what it could')
""",
        "did what it could",
    ),
    Attack(
        "writes outside",
        """
for path in ('{place}/file', '{place}/new', '/usr/new', '/etc/new', '/new'):
    print(attempt(lambda: write(path)), end=' ')
""",
        f"^{_times(5)}$",
    ),
    Attack("reads the caller's files", "print(attempt(lambda: read('{place}/file')))", f"^{_REFUSED}$"),
    Attack(
        "a link that leads out",
        """
attempt(lambda: os.symlink('{place}/file', 'out'))
attempt(lambda: os.symlink('/', 'root'))
for action in (lambda: read('out'), lambda: write('out'), lambda: read('root{place}/file')):
    print(attempt(action), end=' ')
""",
        f"^{_times(3)}$",
    ),
    Attack(
        "a million files",
        """
made = 0
try:
    while made < 10**6: write(str(made)); made += 1
except OSError as fault:
    print(made < 1000, made, fault.strerror)
""",
        "^True",
    ),
    Attack(
        "fills the disk",
        """
size = 0
for number in range(64):
    try:
        with open(str(number), 'wb', buffering=0) as file:
            while True: size += file.write(bytes(2**20))
    except OSError as fault:
        last = fault.strerror
print(size <= 2**24, size, last)
""",
        "^True",
    ),
    Attack(
        "network",
        """
import socket
def tcp(): socket.create_connection(('127.0.0.1', {port}), 2)
def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))
def unix(): socket.socket(socket.AF_UNIX).connect('{socket}')
def pair(): socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '{socket}')
def names(): socket.getaddrinfo('example.org', 80)
print(*map(attempt, (tcp, udp, unix, pair, names)))
""",
        f"^{_times(5)}$",
    ),
    Attack("waits for input", "print(attempt(input))", "^EOFError$"),
    Attack("leaves early: os._exit(0)", "os._exit(0)", "exit code 0 without an answer"),
    Attack("leaves early: sys.exit(0)", "import sys; sys.exit(0)", "SystemExit: 0"),
    Attack(
        "signals to others",
        """
for target in ({pid}, os.getppid(), 1, -1, 0): print(attempt(lambda: os.kill(target, 9)), end=' ')
print(attempt(lambda: os.killpg(os.getpgid(0), 9)))
""",
        f"^{_times(6)}$",
    ),
    Attack(
        "the caller's limits, priority, processors and signals of its files",
        """
import fcntl, resource, signal
def signal_by_a_pipe():
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(ends[0], fcntl.F_SETOWN, {pid})
    fcntl.fcntl(ends[0], fcntl.F_SETFL, os.O_ASYNC)
    os.write(ends[1], b'x')
print(
    attempt(lambda: resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))),
    attempt(lambda: os.setpriority(os.PRIO_PROCESS, {pid}, 19)),
    attempt(lambda: os.sched_setaffinity({pid}, [0])),
    attempt(signal_by_a_pipe),
    resource.getrlimit(resource.RLIMIT_CPU)[0],
)
""",
        f"^{_times(4)} [0-9]+$",
    ),
    Attack("kills itself", "os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    Attack(
        "/proc of the caller",
        """
for target in ({pid}, os.getppid()):
    for name in ('environ', 'maps', 'mem'): print(attempt(lambda: read(f'/proc/{target}/{name}')), end=' ')
""",
        f"^{_times(6)}$",
    ),
    Attack(
        "what it inherits",
        """
held = [number for number in range(3, 64) if attempt(lambda: os.fstat(number)) != 'OSError']
print(dict(os.environ).keys() - {'LC_CTYPE', 'PWD'}, len(held))
""",
        r"^set\(\) [0-3]$",
    ),
    Attack(
        "calls of the kernel, by number",
        """
import ctypes
library = ctypes.CDLL(None, use_errno=True)
calls = dict(unshare=272, mount=165, ptrace=101, bpf=321, io_uring=425, keyctl=250, setns=308, clone3=435)
print([name for name, number in calls.items() if library.syscall(number, 0, 0, 0, 0, 0) != -1])
""",
        r"^\[\]$",
    ),
    Attack("a flood of output", "while True: print('x' * 1000)", "more output than is kept"),
    Attack(
        "an answer of 100 MB",
        """
import sys
frame = sys._getframe()
while 'self' not in frame.f_locals: frame = frame.f_back
frame.f_locals['self']._answers.write((10**8).to_bytes(4, 'big'))
""",
        "an answer of more than 1 MiB",
    ),
)
"""Numbers of calls are x86-64's; elsewhere they are others."""


@dataclasses.dataclass(frozen=True)
class Bait:
    """What attacks are aimed at."""

    place: Path
    port: int
    path: Path

    def untouched(self) -> bool:
        """Say whether the file is as it was and nobody came by."""
        return (self.place / "file").read_text() == "mine" and sorted(os.listdir(self.place)) == [
            "file",
            "socket",
        ]


@contextlib.contextmanager
def bait() -> Iterator[Bait]:
    """Lay out a file that everybody may read, a TCP port and a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="bait-") as folder, contextlib.ExitStack() as held:
        place = Path(folder)
        place.chmod(0o755)
        (place / "file").write_text("mine")
        server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = held.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(place / "socket"))
        unix.listen()
        (place / "socket").chmod(0o777)
        yield Bait(place=place, port=server.getsockname()[1], path=place / "socket")


def attack(sandbox: Sandbox, one: Attack, aim: Bait) -> str:
    """Run one program and return what became of it."""
    words = {"place": str(aim.place), "port": str(aim.port), "socket": str(aim.path), "pid": str(os.getpid())}
    source = re.sub(r"\{(place|port|socket|pid)\}", lambda found: words[found[1]], one.source)
    with sandbox.open() as process:
        try:
            answer = process.ask({"run": TRY + source})
        except Ended as end:
            return str(end)
    return str(answer["error"][2] if answer["error"] else answer["output"].strip())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", default=["namespaces", "bubblewrap", "filters"], help="of isolation"
    )
    for kind in parser.parse_args().kinds:
        try:
            sandbox = Sandbox(kind, LIMITS)
        except SandboxError as fault:
            print(f"{kind}: {fault}\n")
            continue
        print(f"| {kind}: attack | what became of it | s | as it should |\n|---|---|---|---|")
        with bait() as aim:
            for one in ATTACKS:
                start = time.perf_counter()
                end = attack(sandbox, one, aim)
                good = bool(re.search(one.expected, end)) and aim.untouched()
                seconds = time.perf_counter() - start
                print(f"| {one.name} | {end[:110]} | {seconds:.2f} | {'yes' if good else 'NO'} |", flush=True)
        print()


if __name__ == "__main__":
    main()
