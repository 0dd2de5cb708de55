"""Kill a run at random moments, look at what is left, go on, and compare with a run nobody killed.

    python tools/kill_test.py                (100 kills, 2 ranks, a save every 2 steps: about 20 minutes)
    python tools/kill_test.py --kills 3

Each life of the run is `tide train` in real processes, asynchronous saves and waiting ones in turns, ended by
SIGKILL to all of its processes: mostly a random time after its first new step, every tenth while it starts.
After a kill every checkpoint under its final name must be whole, byte for byte, and the next life says where
it goes on. What may be lost: the save under way, with the steps since. So a waiting save loses at most one
interval, an asynchronous one less than two, and neither ever a save that was reported done. At the end the
losses of all steps are compared with those of a run that was never killed. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tests.tiny_run import write_tiny_run
from tide_megatron.base.files import damage
from tide_megatron.checkpoint.retention import Checkpoints, Mark, listed
from tide_megatron.launch.signals import STOPPED_CODE

ROOT = Path(__file__).resolve().parents[1]
EVERY, START_SECONDS = 2, 120.0
RECORD = "metrics.jsonl"
MODES = ("asynchronous", "waiting")
LIMITS = {"asynchronous": EVERY + Checkpoints(every=EVERY).most_ahead, "waiting": EVERY}
"""Steps that a kill may cost: an interval, and what has been done of the next while it was being saved."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What the kills did."""

    kills: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)
    """Checkpoints under their final names that were not whole."""
    lost_more: list[str] = dataclasses.field(default_factory=list)
    """Lives that went on from further back than the save before the one that had begun."""
    interrupted_saves: int = 0
    """Kills that fell into a save."""
    most_lost: dict[str, int] = dataclasses.field(default_factory=dict)
    """Steps that had to be done again at most, by kind of save."""
    different: list[int] = dataclasses.field(default_factory=list)
    """Steps whose loss or gradient norm is not that of the run nobody killed."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost that should not be."""
        return not (self.unreadable or self.lost_more or self.different)


class Life:
    """One start of the run, until it is killed."""

    def __init__(self, recipe: Path, folder: Path, ranks: int, *, is_asynchronous: bool) -> None:
        """Start `tide train`."""
        self.folder = folder
        self._record = _inode(folder / RECORD)
        words = [f"checkpoints.every={EVERY}", f"checkpoints.asynchronous={str(is_asynchronous).lower()}"]
        words += ["steps=100000", "optimizer.schedule=constant", "optimizer.warmup=0.0"]
        command = [
            sys.executable,
            "-m",
            "tide_megatron.commands",
            "train",
            str(recipe),
            "--ranks",
            str(ranks),
        ]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this object
        self._process = subprocess.Popen(
            [*command, "--folder", str(folder), *words],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,
        )

    def wait_for_step(self, step: int = -1) -> int:
        """Wait until this life has recorded a step, and one after `step`; return where it went on from."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            # A life takes up the record by replacing the file; only then what it holds is this life's.
            if _inode(self.folder / RECORD) != self._record:
                found = re.search(r"resumed from step (\d+),", self.said())
                start = int(found[1]) if found else 0
                if last_step(self.folder) > max(start, step):
                    return start
            assert self._process.poll() is None, f"the run ended by itself:\n{self.said()}"
            assert time.monotonic() < deadline, f"no step within {START_SECONDS:g} s:\n{self.said()}"
            time.sleep(0.01)

    def kill(self, draw: random.Random) -> None:
        """Kill all of its processes at once, in an order that is drawn."""
        pids = [self._process.pid, *descendants(self._process.pid)]
        draw.shuffle(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pid in pids:
            while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
                time.sleep(0.01)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ask for an orderly end and wait for it."""
        self._process.send_signal(number)
        assert self._process.wait(START_SECONDS) == STOPPED_CODE, self.said()
        said = self.said()
        assert "the same command goes on" in said, said
        assert "Traceback" not in said, said

    def said(self) -> str:
        """Return what the run wrote to stderr."""
        self._said.seek(0)
        return self._said.read()


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, rest = path.parent.name, path.read_text().rpartition(")")[2].split()
            children.setdefault(int(rest[1]), []).append(int(number))
    found, waiting = [], [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def last_step(folder: Path) -> int:
    """Return the last step in the run's record; -1 when there is none."""
    steps = figures(folder)
    return max(steps, default=-1)


def figures(folder: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of every recorded step; a line that a kill cut is left out."""
    path, found = folder / RECORD, {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record["kind"] == "train":
                found[int(record["step"])] = (record["loss"], record["grad_norm"])
    return found


def look(folder: Path, tally: Tally) -> int:
    """Note what is not whole; return the step of the newest finished save, 0 when there is none."""
    newest, checkpoints = 0, folder / "checkpoints"
    for path in listed(checkpoints):
        faults = damage(path)
        if faults:
            tally.unreadable.append(f"kill {tally.kills}: {path.name}: {'; '.join(faults)}")
        else:
            newest = max(newest, Mark.of(path).step)
    tally.interrupted_saves += any(checkpoints.glob("step-*.partial"))
    return newest


def torment(recipe: Path, folder: Path, kills: int, ranks: int, seed: int) -> Tally:
    """Let the run live and die so many times, and let a last life stop in order."""
    draw, tally = random.Random(seed), Tally()
    done = saved = 0
    mode = MODES[0]
    for number in range(kills + 1):
        before, mode = mode, MODES[number % 2]
        life = Life(recipe, folder, ranks, is_asynchronous=mode == MODES[0])
        if number and number % 10 == 0 and number < kills:
            time.sleep(draw.uniform(0.5, 8.0))  # while it starts
            mode = before
        else:
            start = life.wait_for_step()
            note(
                tally,
                before,
                done - start,
                f"done {done}, saved {saved}, went on from {start}",
                start >= saved,
            )
            if number == kills:
                life.stop()
                break
            time.sleep(draw.uniform(0.0, 1.0))
        life.kill(draw)
        tally.kills += 1
        done, saved = max(0, last_step(folder)), look(folder, tally)
        print(f"kill {tally.kills}: {mode}, {done} steps done, saved up to {saved}", file=sys.stderr)
    return tally


def note(tally: Tally, mode: str, lost: int, told: str, is_kept: bool) -> None:
    """Note what a kill cost; `is_kept` says that no finished save was lost."""
    tally.most_lost[mode] = max(lost, tally.most_lost.get(mode, 0))
    if not is_kept or lost > LIMITS[mode]:
        tally.lost_more.append(f"kill {tally.kills} ({mode}): {lost} steps lost; {told}")


def run(kills: int, ranks: int, seed: int, folder: Path) -> Tally:
    """Torment a run in a folder, then compare it with one that nobody killed."""
    recipe = write_tiny_run(folder / "tiny")
    tally = torment(recipe, folder / "killed", kills, ranks, seed)
    got = figures(folder / "killed")
    whole = Life(recipe, folder / "whole", ranks, is_asynchronous=True)
    whole.wait_for_step(max(got))
    whole.stop()
    wanted = figures(folder / "whole")
    tally.different = [step for step in range(1, max(got) + 1) if got.get(step) != wanted[step]]
    return tally


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = run(options.kills, options.ranks, options.seed, Path(folder))
    print(json.dumps(dataclasses.asdict(tally), indent=1))
    sys.exit(int(not tally.is_good))


if __name__ == "__main__":
    main()
