"""The kinds of faults: each plants one in a run, sees that it is noticed, and lets the run go on to its end.

A kind is a function of a `Site`, a source of random numbers and the `Seen` that it fills in. What is wrong
is an AssertionError. Processes, signals, disks, networks and files are real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chaos_runs import clock, network
from chaos_runs.network import Hosts
from chaos_runs.seen import Seen, ended, goes_on, resumed
from chaos_runs.starts import EVERY, HANG_SECONDS, MOST_LOST, RUN_SECONDS, STEPS, Site, Start
from tests.slurm.runs import figures
from tests.tiny_run import copy_tiny_run
from tide_megatron.checkpoint.retention import listed

FIRST, LAST = EVERY + 1, STEPS // 2
"""A fault is planted after one of these updates: when something has been saved, and much is left to do."""
DISK_BYTES = 8_000_000
LOST_CODE, STOPPED_CODE, FAULT_CODE = 70, 75, 2
START_LIMIT = 240.0
"""What is found at a start is said before its first step; a start takes 8 s here, and minutes under load."""


def begun(site: Site, draw: random.Random) -> tuple[Start, int]:
    """Start a run and wait for a random moment; return the last update until then."""
    start = site.start()
    start.is_past(draw.randint(FIRST, LAST))
    time.sleep(draw.uniform(0.0, 0.2))
    return start, start.step()


def most_lost(site: Site, draw: random.Random) -> int:
    """Draw how the run saves; return the updates that a hard end may cost then."""
    if draw.random() < 0.5:
        site.words += ("checkpoints.asynchronous=false",)
        return EVERY
    return MOST_LOST


def kill_a_rank(site: Site, draw: random.Random, seen: Seen) -> None:
    """SIGKILL to a rank."""
    most = most_lost(site, draw)
    start, step = begun(site, draw)
    rank = draw.randrange(site.ranks_per_node)
    since = time.monotonic()
    os.kill(start.ranks()[rank], signal.SIGKILL)
    seen.what = f"rank {rank} after update {step}"
    seen.notice(start, f"rank {rank} of {site.ranks_per_node} failed first: it was killed by SIGKILL", since)
    ended(start, LOST_CODE)
    goes_on(site, seen, start.step(), most)


def stop_a_rank(site: Site, draw: random.Random, seen: Seen) -> None:
    """SIGSTOP to a rank."""
    most = most_lost(site, draw)
    start, step = begun(site, draw)
    rank = draw.randrange(site.ranks_per_node)
    since = time.monotonic()
    os.kill(start.ranks()[rank], signal.SIGSTOP)
    seen.what = f"rank {rank} after update {step}"
    said = f"rank {rank} of {site.ranks_per_node} failed first: it stands still: .* stopped by a signal"
    seen.notice(start, said, since)
    ended(start, LOST_CODE)
    goes_on(site, seen, start.step(), most)


def slow_a_rank(site: Site, draw: random.Random, seen: Seen) -> None:
    """Stop a rank and let it go on, many times, until it has been noticed."""
    site.ranks_per_node = 4
    start, step = begun(site, draw)
    rank = draw.randrange(site.ranks_per_node)
    seen.what = f"rank {rank} from update {step} on"
    since, is_over = time.monotonic(), threading.Event()

    def hold_up(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            while not is_over.is_set():
                os.kill(pid, signal.SIGSTOP)
                is_over.wait(0.5)
                os.kill(pid, signal.SIGCONT)
                is_over.wait(0.05)

    thread = threading.Thread(target=hold_up, args=(start.ranks()[rank],))
    thread.start()
    try:
        seen.notice(start, rf"rank {rank} \(\S+\) keeps the others waiting", since)
    finally:
        is_over.set()
        thread.join()
    ended(start, 0, seconds=RUN_SECONDS)


def lose_a_node(site: Site, draw: random.Random, seen: Seen) -> None:
    """End all processes of one of two nodes at once; after a loss of power nobody is even told."""
    most = most_lost(site, draw)
    with two_hosts(site) as hosts:
        start, step = begun(site, draw)
        node, has_power = draw.randrange(2), draw.random() < 0.5
        since = time.monotonic()
        if not has_power:
            hosts.cut(node, "link")
        start.kill([node])
        how = "its processes killed" if has_power else "no power"
        seen.what = f"node {node} after update {step}, {how}"
        seen.notice(start, f"error: node {node} failed first", since, node=1 - node)
        assert start.ends(60.0, [1 - node]) == [LOST_CODE], start.said()[-3000:]
    goes_on(site, seen, start.step(), most)


def cut_the_network(site: Site, draw: random.Random, seen: Seen) -> None:
    """Cut the network of one of two nodes; both must notice."""
    most = most_lost(site, draw)
    with two_hosts(site) as hosts:
        start, step = begun(site, draw)
        node, how = draw.randrange(2), draw.choice(("link", "switch"))
        since = time.monotonic()
        hosts.cut(node, how)
        seen.what = f"node {node} after update {step}, at the {how}"
        for each in (0, 1):
            seen.notice(start, f"error: node {1 - each} failed first: no sign of life", since, node=each)
        ended(start, LOST_CODE)
    goes_on(site, seen, start.step(), most)


@contextlib.contextmanager
def two_hosts(site: Site) -> Iterator[Hosts]:
    """Let the run's next start stand on two hosts; later ones on two nodes of one."""
    site.nodes = 2
    with Hosts() as hosts:
        site.hosts = hosts
        try:
            yield hosts
        finally:
            site.close()
            site.hosts = None


def fill_the_disk(site: Site, draw: random.Random, seen: Seen) -> None:
    """Fill the disk of the run folder, up to a random number of bytes."""
    most = most_lost(site, draw)
    mount = site.folder
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", mount], check=True)
    try:
        site.folder = mount / "run"
        start, step = begun(site, draw)
        left = draw.choice((0, draw.randrange(100_000)))
        since = time.monotonic()
        with (mount / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(4096))
        os.truncate(mount / "other", max(0, (mount / "other").stat().st_size - left))
        seen.what = f"after update {step}, {left // 1000} kB left"
        seen.notice(start, rf"error: .*\({os.strerror(errno.ENOSPC)}\)", since)
        ended(start, FAULT_CODE)
        (mount / "other").unlink()
        goes_on(site, seen, start.step(), most)
        seen.is_equal = None
        shutil.copytree(site.folder, mount.with_name(f"{mount.name}-kept"))
    finally:
        site.close()
        subprocess.run(["umount", "--lazy", mount], check=True)
    site.folder = mount.with_name(f"{mount.name}-kept")


def stopped_in_order(site: Site, draw: random.Random) -> int:
    """Start a run, stop it in order after a random update, and return that."""
    start, _ = begun(site, draw)
    start.launchers[0].send_signal(signal.SIGINT)
    ended(start, STOPPED_CODE)
    return start.step()


def _damage_a_file(site: Site, draw: random.Random, seen: Seen, harm: Callable[[Path], str]) -> None:
    step = stopped_in_order(site, draw)
    newest = listed(site.folder / "checkpoints")[-1]
    file = draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    seen.what = f"{file.name} {harm(file)}, after update {step}"
    since = time.monotonic()
    start = site.start()
    seen.notice(start, rf"{newest.name} is damaged \(.*{re.escape(file.name)}", since)
    ended(start, 0, seconds=RUN_SECONDS)
    at, seen.lost = resumed(start)
    assert at + seen.lost == step, start.said()[-3000:]
    assert 0 < seen.lost <= EVERY, f"{seen.lost} updates lost, of {EVERY} between two saves"


def truncate_a_file(site: Site, draw: random.Random, seen: Seen) -> None:
    """Cut a file of the newest checkpoint short between two starts."""

    def cut(file: Path) -> str:
        size = draw.randrange(file.stat().st_size)
        os.truncate(file, size)
        return f"cut to {size} bytes"

    _damage_a_file(site, draw, seen, cut)


def flip_a_byte(site: Site, draw: random.Random, seen: Seen) -> None:
    """Change a byte of a file of the newest checkpoint between two starts."""

    def flip(file: Path) -> str:
        at, whole = draw.randrange(file.stat().st_size), bytearray(file.read_bytes())
        whole[at] ^= 1 << draw.randrange(8)
        file.write_bytes(whole)
        return f"byte {at} changed"

    _damage_a_file(site, draw, seen, flip)


def take_data_away(site: Site, draw: random.Random, seen: Seen) -> None:
    """Take a file of the data away between two starts; when it is back the run goes on."""
    site.tiny = copy_tiny_run(site.tiny, site.folder.with_name(f"{site.folder.name}-tiny"))
    step = stopped_in_order(site, draw)
    file = draw.choice(sorted(path for path in (site.tiny.parent / "data").rglob("*") if path.is_file()))
    away = site.tiny.parent / "away"
    file.rename(away)
    try:
        seen.what = f"{file.parent.name}/{file.name}, after update {step}"
        since = time.monotonic()
        start = site.start()
        seen.notice(start, rf"error: .*{re.escape(str(file.parent))}", since)
        assert file.name in seen.words, f"{file.name} is not named: {seen.words}"
        ended(start, FAULT_CODE)
    finally:
        away.rename(file)
    goes_on(site, seen, step, 0)


def _harm(site: Site, start: Start, step: int, harm: dict[str, Any]) -> float:
    """Let a rank do itself a harm; return when."""
    file = Path(site.variables["TIDE_CHAOS_HARM"])
    partial = file.with_suffix(".new")
    partial.write_text(json.dumps(harm))
    partial.rename(file)
    end = time.monotonic() + 60
    while "is_done" not in json.loads(file.read_text()):
        assert time.monotonic() < end, f"no harm was done:\n{start.said()[-3000:]}"
        time.sleep(0.005)
    return time.monotonic()


def spoil_a_teacher(site: Site, draw: random.Random, seen: Seen) -> None:
    """Make a teacher's weights NaN on one rank; without `guard.returns` the run ends at once."""
    _plantable(site)
    site.words += ("guard.returns=0",)
    start, step = begun(site, draw)
    rank = draw.randrange(site.ranks_per_node)
    since = _harm(site, start, step, {"rank": rank, "what": "teacher"})
    seen.what = f"rank {rank} after update {step}"
    seen.notice(start, r"teachers\.moe: its answer is not finite for samples \d+", since)
    line = start.says(r"error: .* updates in a row were not finite", 30.0)
    assert line, start.said()[-3000:]
    ended(start, FAULT_CODE)
    Path(site.variables["TIDE_CHAOS_HARM"]).unlink()
    again = site.start()
    ended(again, 0, seconds=RUN_SECONDS)
    _, seen.lost = resumed(again)
    assert seen.lost <= EVERY, f"{seen.lost} updates lost, more than {EVERY}"


def spoil_a_gradient(site: Site, draw: random.Random, seen: Seen) -> None:
    """Make a gradient NaN on one rank: one or two are skipped, after three the run goes back by itself."""
    _plantable(site)
    start, step = begun(site, draw)
    rank, updates = draw.randrange(site.ranks_per_node), draw.randint(1, 3)
    since = _harm(site, start, step, {"rank": rank, "what": "gradient", "updates": updates})
    seen.what = f"rank {rank} after update {step}, {updates} times"
    seen.notice(start, r"step \d+ was skipped: gradient norm nan", since)
    if updates == 3:
        seen.notice(start, r"3 updates in a row were not finite; the run goes back to step \d+", since)
    ended(start, 0, seconds=RUN_SECONDS)
    skipped = len(re.findall(r"WARNING  step \d+ was skipped", start.said()))  # rank 0 says it so
    assert skipped == updates, f"{skipped} updates were skipped, not {updates}"
    back = re.search(r"goes back to step (\d+)", start.said())
    seen.lost = step + 1 - int(back[1]) if back else 0
    seen.passed_over = updates + max(0, seen.lost)
    assert seen.lost <= MOST_LOST, f"{seen.lost} updates are done again"


def _plantable(site: Site) -> None:
    """Let ranks listen to the file of harms."""
    site.program = (str(Path(__file__).with_name("planted_train.py")),)
    site.variables["TIDE_CHAOS_HARM"] = f"{site.folder}-harm"


def move_the_clock(site: Site, draw: random.Random, seen: Seen) -> None:
    """Let the time of day jump for all processes of the run; other clocks go on as ever."""
    moved = clock.Clock(site.folder.with_name(f"{site.folder.name}-clock"))
    site.variables |= moved.variables
    start, step = begun(site, draw)
    jump = draw.choice((-1, 1)) * draw.randint(60, 100_000)
    since = time.monotonic()
    moved.move(jump)
    seen.what = f"by {jump:+d} s after update {step}"
    seen.notice(start, rf"the clock of this machine jumped by [+-]{abs(jump)} s", since)
    ended(start, 0, seconds=RUN_SECONDS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    plant: Callable[[Site, random.Random, Seen], None]
    limit: float
    is_equal: bool = True
    """Whether the run must give the undisturbed run's bits."""
    why_not: Callable[[], str | None] = lambda: None
    """Says why it cannot be planted here."""

    def run(self, site: Site, draw: random.Random, number: int, reference: Callable[[int], Any]) -> Seen:
        """Plant one, and look."""
        seen = Seen(number=number, kind=self.name, limit=self.limit)
        began = time.monotonic()
        try:
            self.plant(site, draw, seen)
            if self.is_equal:
                seen.is_equal = figures(site.folder) == reference(site.nodes * site.ranks_per_node)
                assert seen.is_equal, "the figures are not those of the undisturbed run"
        except (AssertionError, subprocess.SubprocessError, OSError, ValueError, IndexError) as fault:
            seen.wrong = f"{type(fault).__name__}: {fault}"
        finally:
            site.close()
        seen.seconds = time.monotonic() - began
        return seen


def _without_root() -> str | None:
    return None if os.geteuid() == 0 else "mounting a small disk needs root"


_NODE_SECONDS = HANG_SECONDS / 2 + 12.0
KINDS: Sequence[Kind] = (
    Kind("a rank killed (SIGKILL)", kill_a_rank, 10.0),
    Kind("a rank stopped (SIGSTOP)", stop_a_rank, HANG_SECONDS + 12.0),
    Kind("a slow rank", slow_a_rank, 30.0),
    Kind("a node down", lose_a_node, _NODE_SECONDS, why_not=network.why_not),
    Kind("the network of a node cut", cut_the_network, _NODE_SECONDS, why_not=network.why_not),
    Kind("a full disk in a save", fill_the_disk, 15.0, why_not=_without_root),
    Kind("a checkpoint's file cut short", truncate_a_file, START_LIMIT),
    Kind("a byte of a checkpoint changed", flip_a_byte, START_LIMIT),
    Kind("a data file missing", take_data_away, START_LIMIT),
    Kind("NaN in a teacher's weights", spoil_a_teacher, 10.0),
    Kind("NaN in a gradient", spoil_a_gradient, 10.0, is_equal=False),
    Kind("the clock jumps", move_the_clock, 10.0, why_not=clock.why_not),
)
