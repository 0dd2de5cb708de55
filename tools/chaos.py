"""Plant faults in runs, random in kind and moment, and see that each is noticed, told, and recovered from.

    python tools/chaos.py                      (40 faults, seed 1: about 20 minutes; make chaos)
    python tools/chaos.py --faults 3 --kinds "a rank killed,a byte of" --page runs/page.md

Every fault has a run of its own: `tide train` in real processes, a tiny model, 60 updates on 2 or 4 ranks, a
save every 4. Ranks are killed, stopped and slowed by signals; nodes are network namespaces with launchers of
their own, whose cable is pulled; disks, files and the clock are real, too. NaN alone comes from within
(`chaos_runs/planted_train.py`). A fault counts as handled when the words of its kind came within the limit of
its kind, the run went on (by itself, or by the same command) to its end, no more was lost than
docs/checkpoints.md says, and losses, gradient norms, scores and the student's bytes are those of a run that
nobody disturbed. NaN in a gradient is the exception: its samples are passed over, so the bits are others.

Every kind that this machine can do comes equally often, or once more. The page says how it went. Exit code 1
if one was not handled.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from chaos_runs.apart import own_mounts
from chaos_runs.kinds import KINDS, Kind
from chaos_runs.seen import Seen
from chaos_runs.starts import EVERY, HANG_SECONDS, MOST_LOST, STEPS, Reference, Site

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reliability.md"


def planned(kinds: Sequence[Kind], count: int, draw: random.Random) -> list[Kind]:
    """Return which faults come, in a random order; of each kind as many, or one more."""
    chosen: list[Kind] = []
    while len(chosen) < count:
        chosen += draw.sample(kinds, min(len(kinds), count - len(chosen)))
    draw.shuffle(chosen)
    return chosen


def plant_all(kinds: Sequence[Kind], seed: int, at_once: int, folder: Path) -> Iterator[Seen]:
    """Plant the faults, several at once; yield what became of each, in the order of their ends."""
    reference = Reference(folder)

    def plant(number: int) -> Seen:
        site = Site(tiny=reference.tiny, folder=folder / f"run-{number}")
        # A fault's own seed: with it the same fault comes whatever the others do.
        return kinds[number - 1].run(site, random.Random(f"{seed} {number}"), number, reference.of)

    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(plant, number + 1) for number in range(len(kinds))]):
            yield done.result()


def told(seen: Seen) -> str:
    """Return a line on a fault."""
    noticed = "-" if seen.noticed is None else f"{seen.noticed:.1f} s"
    outcome = seen.wrong.partition("\n")[0] or "handled"
    return f"{seen.number:3d}  {seen.kind:32} {seen.what:60} {noticed:>8}  lost {seen.lost}  {outcome}"


def page(every: Sequence[Seen], left_out: Sequence[str], command: str, minutes: float, load: str) -> str:
    """Return docs/reliability.md."""
    handled = sum(not seen.wrong for seen in every)
    lines = [
        "# What was planted in runs, and what became of it",
        "",
        f"Written by `{command}` ({minutes:.0f} minutes), commit {_commit()}, on {load}.",
        f"{handled} of {len(every)} faults were handled: noticed within the limit, said, and the run "
        "went on to its end.",
        *(f"Left out: {words}." for words in left_out),
        "",
        *_by_kind(every),
        "",
        RULES,
        *_one_by_one(every),
    ]
    return "\n".join(lines) + "\n"


def _by_kind(every: Sequence[Seen]) -> Iterator[str]:
    yield "| kind | faults | handled | noticed within (limit) s | done again | bit-equal | words of one |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for kind in KINDS:
        of_kind = [seen for seen in every if seen.kind == kind.name]
        if not of_kind:
            continue
        times = [seen.noticed for seen in of_kind if seen.noticed is not None]
        within = f"{min(times):.1f} to {max(times):.1f} ({kind.limit:.0f})" if times else "-"
        equal = f"{sum(seen.is_equal is True for seen in of_kind)}" if kind.is_equal else "cannot be"
        good, lost = sum(not seen.wrong for seen in of_kind), max(seen.lost for seen in of_kind)
        words = _cell(next((seen.words for seen in of_kind if seen.words), ""))
        cells = (kind.name, str(len(of_kind)), str(good), within, f"{lost} at most", equal, words)
        yield f"| {' | '.join(cells)} |"


RULES = f"""\
- Each run: a tiny student and teacher, {STEPS} steps, a save every {EVERY}, 2 ranks of one node; a slow rank
  among 4; the two kinds about nodes: 2 nodes of 2 ranks in network namespaces.
- `hang_seconds={HANG_SECONDS:g}`, for saves and evaluations too (`deadlines`), so a node is missed after
  {HANG_SECONDS / 2:g} s without a sign of life; by default these are 300 s, four times that, and 30 s.
- Noticed: from the fault to the words in a launcher's output, on every node that was left. What lies on the
  disk is found at the next start, before its first step: from the command, most of which is Python's imports.
- Done again: at most an interval between saves, and a quarter of one where an asynchronous save was under
  way ({MOST_LOST} here). The number that the restart says is compared with the run's own record.
- Bit-equal: losses and gradient norms of all steps, held-out scores and the student's file are those of a run
  that nobody disturbed, on as many ranks. After NaN in a gradient they cannot be: those samples are passed
  over, and the log says so.
- By itself the run goes on with a slow rank, NaN in a gradient, another time of day; by the same command
  after all others: after a full disk or a missing file once there was room or the file was back, after the
  loss of a node on other ones.
"""


def _one_by_one(every: Sequence[Seen]) -> Iterator[str]:
    yield "| # | kind | what | noticed after s | done again | passed over | outcome |"
    yield "|--:|---|---|--:|--:|--:|---|"
    for seen in every:
        noticed = "-" if seen.noticed is None else f"{seen.noticed:.1f}"
        equal = {True: "handled, bit-equal", False: "other bits", None: "handled"}[seen.is_equal]
        outcome = f"**{_cell(seen.wrong)}**" if seen.wrong else equal
        cells = (seen.kind, _cell(seen.what), noticed, str(seen.lost), str(seen.passed_over), outcome)
        yield f"| {seen.number} | {' | '.join(cells)} |"


def _cell(words: str, most: int = 150) -> str:
    """Return the first line of some words for a table, without what belongs to this machine."""
    line = words.partition("\n")[0].replace("|", "/")
    line = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", line)
    return line if len(line) <= most else line[:most] + "..."


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    """Run from the command line."""
    own_mounts()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--kinds", default="", help="only kinds whose names begin so; several with commas")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"where to write it (default: {PAGE.name})")
    chosen = parser.parse_args()
    wanted = [kind for kind in KINDS if kind.name.startswith(tuple(chosen.kinds.split(",")))]
    reasons = {kind.name: kind.why_not() for kind in wanted}
    left_out = [f"{name}, for {reason}" for name, reason in reasons.items() if reason]
    able = [kind for kind in wanted if not reasons[kind.name]]
    draw, began, load = random.Random(chosen.seed), time.monotonic(), os.getloadavg()
    every: list[Seen] = []
    with tempfile.TemporaryDirectory() as folder:
        for seen in plant_all(planned(able, chosen.faults, draw), chosen.seed, chosen.at_once, Path(folder)):
            every.append(seen)
            print(told(seen), flush=True)
            if seen.wrong:
                print(seen.wrong, flush=True)
    every.sort(key=lambda seen: seen.number)
    command = f"python tools/chaos.py --faults {chosen.faults} --seed {chosen.seed}"
    command += f' --kinds "{chosen.kinds}"' if chosen.kinds else ""
    command += f" --at-once {chosen.at_once}" if chosen.at_once > 1 else ""
    loads = f"load {load[0]:.1f} before and {os.getloadavg()[0]:.1f} after"
    where = f"{os.cpu_count()} cores, {loads}, {platform.system()}"
    minutes = (time.monotonic() - began) / 60
    chosen.page.write_text(page(every, left_out, command, minutes, where), encoding="utf-8")
    return int(any(seen.wrong for seen in every))


if __name__ == "__main__":
    sys.exit(main())
