"""Starts of the tiny run in real processes: the command, its ranks, what it said, when it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos_runs.apart import dying_with_this
from chaos_runs.network import ADDRESSES, INTERFACE, Hosts
from kill_test import descendants
from tests.slurm.runs import figures
from tests.tiny_run import write_tiny_run
from tide_megatron.checkpoint.retention import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 4
"""Updates of a run, and between two saves."""
MOST_LOST = EVERY + Checkpoints(every=EVERY).most_ahead
"""Updates that a hard end may cost: the save under way, and how far training may be ahead of it."""
HANG_SECONDS, TIMEOUT_SECONDS = 12.0, 120.0
START_SECONDS, RUN_SECONDS = 240.0, 400.0
"""How long a start may take to its first step, and to its end, on a busy machine."""
HARM = "TIDE_CHAOS_HARM"
"""The file that tells ranks of `planted_train` what to do to themselves."""
_WORDS = (
    *(f"steps={STEPS}", f"checkpoints.every={EVERY}", "metrics.every=1", f"hang_seconds={HANG_SECONDS}"),
    *(f"timeout_seconds={TIMEOUT_SECONDS}", "guard.not_finite=3"),
    # By default they may take four times as long, and a rank that is stopped there is noticed as late.
    *(f"deadlines.checkpoint={HANG_SECONDS}", f"deadlines.evaluate={HANG_SECONDS}"),
)
_LEFT_OVER = ("SLURM_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC", "NNODES", "NODE_RANK")


class Start:
    """One start of a run: a launcher on each of its nodes."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        hosts: Hosts | None,
        folder: Path,
    ) -> None:
        """Start it; on two hosts where there are some."""
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OVER)}
        self._said = [tempfile.TemporaryFile("w+") for _ in environments]  # noqa: SIM115 - as long as this
        self.launchers = [
            subprocess.Popen(
                [*dying_with_this(), *(hosts.entering(node) if hosts else []), *command],
                cwd=ROOT,
                env=clean | {"OMP_NUM_THREADS": "1"} | dict(environment),
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
            for node, (environment, said) in enumerate(zip(environments, self._said, strict=True))
        ]
        self._record = self._inode()
        self.began_at: int | None = None

    def _inode(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def said(self, node: int | None = None) -> str:
        """Return what a launcher and its ranks wrote to stderr; None: of all nodes."""
        texts = []
        for file in self._said if node is None else [self._said[node]]:
            texts.append(os.pread(file.fileno(), 10_000_000, 0).decode(errors="replace"))
        return "\n".join(texts)

    def step(self) -> int:
        """Return the last update that this start has recorded; -1: none."""
        last = -1
        if self._inode() == self._record:  # a start takes the record up by replacing the file
            return last
        with contextlib.suppress(OSError):
            for line in (self.folder / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    last = record["step"] if record["kind"] == "train" else last
        return last

    def is_past(self, step: int) -> int:
        """Wait until an update after `step` is recorded; return it.

        Raises:
            AssertionError: the run ended or stood still before.
        """
        end = time.monotonic() + START_SECONDS
        while (now := self.step()) <= step:
            assert not self.has_ended(), f"ended before step {step}:\n{self.said()}"
            assert time.monotonic() < end, f"no step {step} within {START_SECONDS:g} s:\n{self.said()}"
            time.sleep(0.01)
        return now

    def says(self, pattern: str, seconds: float, node: int | None = None) -> str:
        """Wait for words, also of one that has ended; return the line that holds them, or an empty one."""
        end = time.monotonic() + seconds
        while True:
            has_ended = self.has_ended()
            for line in self.said(node).splitlines():
                if re.search(pattern, line):
                    return line
            if has_ended or time.monotonic() > end:
                return ""
            time.sleep(0.02)

    def has_ended(self) -> bool:
        """Say whether all launchers have ended."""
        return all(each.poll() is not None for each in self.launchers)

    def ends(self, seconds: float = RUN_SECONDS, nodes: Sequence[int] | None = None) -> list[int | None]:
        """Wait until launchers have ended; return their exit codes, None of one that has not."""
        end = time.monotonic() + seconds
        waiting = self.launchers if nodes is None else [self.launchers[node] for node in nodes]
        while any(each.poll() is None for each in waiting) and time.monotonic() < end:
            time.sleep(0.02)
        return [each.poll() for each in waiting]

    def ranks(self, node: int = 0) -> list[int]:
        """Return the processes of a node's ranks, in their order: each leads a session of its own."""
        return sorted(pid for pid in descendants(self.launchers[node].pid) if _session(pid) == pid)

    def kill(self, nodes: Sequence[int] | None = None) -> None:
        """End all processes of nodes at once, and what is left of them."""
        for node in range(len(self.launchers)) if nodes is None else nodes:
            pids = [self.launchers[node].pid, *descendants(self.launchers[node].pid)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.launchers[node].wait()

    def close(self) -> None:
        """End what still runs."""
        self.kill()
        for file in self._said:
            file.close()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


@dataclasses.dataclass(kw_only=True)
class Site:
    """One fault's place: a run folder of its own, and how the same command is given again."""

    tiny: Path
    """The recipe's file; models and data stand beside it."""
    folder: Path
    """Of the run."""
    words: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 2
    hosts: Hosts | None = None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "tide_megatron.commands")
    starts: list[Start] = dataclasses.field(default_factory=list)

    def start(self) -> Start:
        """Give the run's command."""
        which = ["--ranks", str(self.ranks_per_node)]
        environments = [self.variables]
        if self.nodes > 1:
            which = ["--ranks-per-node", str(self.ranks_per_node)]
            environments = [self.variables | self._place(node) for node in range(self.nodes)]
        command = [sys.executable, *self.program, "train", str(self.tiny), *which]
        words = [f"folder={json.dumps(str(self.folder))}", *_WORDS, *self.words]
        begun = Start([*command, *words], environments, self.hosts, self.folder)
        self.starts.append(begun)
        return begun

    def _place(self, node: int) -> dict[str, str]:
        place = {"NNODES": str(self.nodes), "NODE_RANK": str(node)}
        if self.hosts is not None:
            place |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}
            return place | {"MASTER_PORT": "29500"}
        if not node:
            with socket.create_server(("127.0.0.1", 0)) as server:
                self.variables["MASTER_PORT"] = str(server.getsockname()[1])
        return place | {"MASTER_ADDR": "127.0.0.1", **self.variables}

    def close(self) -> None:
        """End what still runs."""
        for each in self.starts:
            each.close()


class Reference:
    """What the run gives when nobody disturbs it, by number of ranks."""

    def __init__(self, folder: Path) -> None:
        """Write models, data and recipe."""
        self._folder = folder
        self.tiny = write_tiny_run(folder / "tiny")
        self._known: dict[int, Any] = {}
        self._one_at_a_time = threading.Lock()

    def of(self, ranks: int) -> Any:
        """Return its figures on so many ranks of one launcher."""
        with self._one_at_a_time:
            if ranks not in self._known:
                self._known[ranks] = self._run(ranks)
            return self._known[ranks]

    def _run(self, ranks: int) -> Any:
        site = Site(tiny=self.tiny, folder=self._folder / f"undisturbed-{ranks}", ranks_per_node=ranks)
        codes = site.start().ends()
        said = site.starts[0].said()
        site.close()
        assert codes == [0], f"the undisturbed run ended with {codes}:\n{said}"
        return figures(site.folder)
