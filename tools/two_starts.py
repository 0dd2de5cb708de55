"""Start one run twice, at random offsets, and see that exactly one of the two trains and nothing is damaged.

    python tools/two_starts.py                       (50 offsets, about five minutes on two cores)
    python tools/two_starts.py --starts 10 --seed 3

Both are whole `tide train` commands, forked from this process, which has imported everything, on one new run
folder (every second time on a folder with two steps done, which both go on with). Exactly one may train; the
other one has to end with exit code 2 and one message that names the process that it was in the way of, or,
coming after the first one's end, with 0 and the word that the run has finished. Then the steps that were
recorded are counted, and `tide checkpoint verify` reads all that was saved.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from tide_megatron.platform import prepare_platform

import torch

from fuzz_verbs import forked, make_fixtures

SECONDS = 120.0
STEPS = 6


def start_twice(fixtures: Path, at: Path, offset: float, is_resumed: bool) -> tuple[str, list[str]]:
    """Return how the two ended, and what is wrong with it."""
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir()
    run = at / "run"
    if is_resumed:
        shutil.copytree(fixtures / "run", run)
    words = [
        "train",
        f"{fixtures}/run.yaml",
        f"folder={run}",
        f"steps={STEPS}",
        "checkpoints.every=2",
        "metrics.every=1",
    ]
    ends: list[tuple[int, str]] = [(-1, ""), (-1, "")]

    def start(number: int) -> None:
        time.sleep(number * offset)
        code, text, _ = forked(words, at / f"log{number}", SECONDS)
        ends[number] = (code, text)

    threads = [threading.Thread(target=start, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = sorted(_told(code, text) for code, text in ends)
    wrong = [] if told in (["refused", "trained"], ["finished", "trained"]) else [text for _, text in ends]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    if steps != [*range(1, STEPS + 1)]:
        wrong.append(f"steps {steps}")
    code, text, _ = forked(["checkpoint", "verify", str(run)], at / "log", SECONDS)
    if code:
        wrong.append(text)
    wrong += [f"left: {path.name}" for path in run.iterdir() if path.name.startswith(".")]
    return " and ".join(told), wrong


def _told(code: int, text: str) -> str:
    if code == 2 and "in use by host" in text and text.count("error: ") == 1:
        return "refused"
    if code == 0 and "already finished" in text:
        return "finished"
    return "trained" if code == 0 else f"exit code {code}"


def main() -> None:
    """Parse, try, print a line each, and end with exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds; half of the offsets are near 0")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    prepare_platform()
    chance, counts, is_bad = random.Random(given.seed), dict[str, int](), False
    with tempfile.TemporaryDirectory() as folder:
        fixtures = Path(folder) / "fixtures"
        fixtures.mkdir()
        make_fixtures(fixtures)
        for number in range(given.starts):
            offset = chance.uniform(0, 0.1 if chance.random() < 0.5 else given.longest)
            told, wrong = start_twice(fixtures, Path(folder) / "case", offset, bool(number % 2))
            counts[told] = counts.get(told, 0) + 1
            is_bad |= bool(wrong)
            print(f"{number:3} {offset:6.3f} s: {told}", *wrong, sep="\n  " if wrong else "", flush=True)
    print(counts)
    sys.exit(is_bad)


if __name__ == "__main__":
    main()
