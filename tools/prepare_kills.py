"""Kill `tide prepare` at random moments, let the same command go on, and compare with what nobody disturbed.

    python tools/prepare_kills.py                (50 kills: about four minutes)
    python tools/prepare_kills.py --kills 3

Each life is a process group of its own, with one or two encoding processes, killed by SIGKILL as a whole:
half of the lives at a random time, the others as they are about to make, open, rename or remove the n-th file
of their work, so that every moment between two changes of the disk can be met. A commit is made every few
records, or behind every one. When a life ends by itself, its folder must be the undisturbed one's, byte for
byte, and nothing may lie beside it; then another round begins. Exit code 1 if anything is wrong.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from typer.testing import CliRunner

from tests.small_tokenizer import write_other, write_tokenizer
from tide_megatron.commands import app

ROOT = Path(__file__).resolve().parents[1]
TARGET = "prepared-here"
LEASE_REST = f".{TARGET}.lease-"
"""So begin names of files that a lease tidies up after a minute, if a kill falls between two of its calls."""
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
CHILD = """
import os, signal, sys
from tide_megatron import commands
from tide_megatron.data.preparation import filling, parallel_encoder
changes, last, target = CHANGES, int(sys.argv.pop(1)), os.path.basename(sys.argv[2])
filling.COMMIT_SECONDS, parallel_encoder.ALONE, parallel_encoder.PIECE = 0.0 if last else 0.01, 20, 10
met = 0
def look(event, args):
    global met
    if event in changes and args and isinstance(args[0], (str, bytes, os.PathLike)):
        if target in os.fsdecode(args[0]) and ".lease" not in os.fsdecode(args[0]):
            met += 1
            if met == last:
                os.killpg(0, signal.SIGKILL)
sys.addaudithook(look)
print("began", flush=True)
commands.main()
"""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What the kills did."""

    kills: int = 0
    rounds: int = 0
    """Folders that were finished."""
    went_on: int = 0
    """Lives that went on with what an earlier one had made certain."""
    farthest: int = 0
    """The last record that one went on behind."""
    wrong: list[str] = dataclasses.field(default_factory=list)


def write_inputs(folder: Path, records: int) -> list[str]:
    """Write tokenizers and chats, some of them bad or long; return the words behind a command's target."""
    write_tokenizer(folder / "student")
    write_other(folder / "teacher")
    for name, number in (("one", records), ("two", records // 2)):
        lines = (_line(n) for n in range(number))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [str(folder / "one.jsonl"), str(folder / "two.jsonl"), "--tokenizer", str(folder / "student")]
    words += ["--teacher", f"other={folder / 'teacher'}", "--max-length", "128", "--on-long", "truncate"]
    return [*words, "--on-bad", "skip"]


def _line(number: int) -> str:
    if number % 11 == 7:
        return '{"messages": []}' if number % 2 else "{"
    reply = "abc ü " * (100 if number % 13 == 9 else number % 17 + 1)
    messages = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": reply}]
    return json.dumps({"messages": messages, "source": f"from {number % 3}"})


class Life:
    """One start of the command in a process group of its own.

    Args:
        target: the data folder.
        words: of the command behind it.
        last: change of a file at which it is killed; 0: it is not.
    """

    def __init__(self, target: Path, words: list[str], last: int = 0) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this object
        code = CHILD.replace("CHANGES", repr(CHANGES))
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(last), "prepare", str(target), *words],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,
        )

    def ended(self, seconds: float | None = None) -> int:
        """Wait for its end, or kill it so long after its first words; return its exit code."""
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdout.readline()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        return self._process.wait()

    def said(self) -> str:
        """Return what it wrote to stderr."""
        self._said.seek(0)
        return self._said.read()


def contents(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def torment(folder: Path, kills: int, seed: int, records: int, by_time: float = 0.5) -> Tally:
    """Kill and go on until there were so many kills, and finish what was begun.

    Args:
        folder: to work in.
        kills: how many.
        seed: of the draws.
        records: of the larger of two files.
        by_time: share of the lives that are killed at a random time.
    """
    words, draw, tally = write_inputs(folder, records), random.Random(seed), Tally()
    places = folder / "places"
    whole = CliRunner().invoke(app, ["prepare", str(folder / "whole" / TARGET), *words, "--workers", "1"])
    assert not whole.exit_code, whole.exception
    wanted = contents(folder / "whole" / TARGET)
    while tally.kills < kills or (places.exists() and any(places.iterdir())):
        is_last = tally.kills >= kills
        last = 0 if is_last or draw.random() < by_time else draw.randint(1, max(200, records // 2))
        seconds = None if last or is_last else draw.uniform(0.0, 3.0)
        life = Life(places / TARGET, [*words, "--workers", str(draw.choice((1, 2)))], last)
        code = life.ended(seconds)
        if found := re.search(r"goes on behind record (\d+)", life.said()):
            tally.went_on += 1
            tally.farthest = max(tally.farthest, int(found[1]))
        if code == -signal.SIGKILL:
            tally.kills += 1
            if (places / TARGET).exists():  # it had its name already: that must be the whole one
                tally.wrong += [] if contents(places / TARGET) == wanted else [f"kill {tally.kills}: a half"]
                (places / TARGET).rename(folder / f"done{tally.kills}")
            print(f"kill {tally.kills}: change {last}, {seconds} s", file=sys.stderr)
            continue
        tally.rounds += 1
        if code or contents(places / TARGET) != wanted:
            tally.wrong.append(f"round {tally.rounds}: exit code {code}, other bytes; {life.said()}")
        left = [path.name for path in places.iterdir() if not path.name.startswith((TARGET, LEASE_REST))]
        tally.wrong += [f"round {tally.rounds}: left behind {left}"] if left else []
        places.rename(folder / f"round{tally.rounds}")
    return tally


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = torment(Path(folder), options.kills, options.seed, options.records)
    print(json.dumps(dataclasses.asdict(tally), indent=1))
    sys.exit(int(bool(tally.wrong) or not tally.went_on))


if __name__ == "__main__":
    main()
