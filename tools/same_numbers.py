"""Say whether two source trees compute the same numbers, bit for bit.

    python tools/same_numbers.py --against GIT_REF      this tree beside a commit, also across a checkpoint
    python tools/same_numbers.py --record FILE.json     this tree alone
    python tools/same_numbers.py --compare FILE.json    this tree beside a record

Five small runs on CPU ranks: the quickstart's two teachers (experts over four ranks; two pipeline stages of
two tensor ranks), CALM and Reverse CALM across tokenizers with complementary views, TIDAL from a teacher in
two stages of two tensor ranks, a run that is cut off and goes on in new processes, and the export of its
student in every form. Compared are losses, counts, gradient norms and learning rates of every step, held-out
scores, prepared data, and a digest of every weight and every exported tensor. `--against` also lets this tree
go on with a checkpoint of the other one, which must end as the other one did.

Nothing of the package is imported: the trees are known by their command line, recipe keys and run folders
only, so that anything behind these may change. Models are the ones that the examples ship, always of this
tree. The exit code is 1 if anything differs. About three minutes for two trees on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import yaml
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "student": "examples/quickstart/models/student",
    "moe": "examples/quickstart/models/teacher",
    "dense": "examples/quickstart/models/dense",
    "own": "examples/cross_tokenizer/models/teacher",
}
COMPARED = ("loss", "items", "lambda", "grad_norm", "learning_rate", "hidden_share")
"""First words of the names in metrics.jsonl that are mathematics; the rest is time, memory and traffic."""
TENSOR = "tensor "
"""Begins the names of digests, of which there are too many to be shown one by one."""
WHOLE, RESUMED = "never stopped", "cut off and resumed"
CROSSED = "the other tree's, resumed here"
CUT_AT = "step-00000002-"
"""Begins the name of the checkpoint that the cut run goes on from."""

Numbers = dict[str, dict[str, str]]
"""Run -> what -> its value as text, exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: ranks, and what its recipe says beside `BASE`."""

    ranks: int
    recipe: Mapping[str, Any]


def teacher(name: str, **options: Any) -> dict[str, Any]:
    """Return a teacher's part of a recipe; it reads as the student does unless told otherwise."""
    context = {"kind": "block_diffusion", "block_size": 16}
    return {"folder": f"models/{name}", "context": context, "sanity": "warn", **options}


CE = {"ce": {"kind": "cross_entropy"}}
CUT = {"tensor": 2, "pipeline": 2}
BASE = {
    "seed": 11,
    "steps": 4,
    "device": "cpu",
    "student": {"folder": "models/student", "context": {"kind": "block_diffusion", "block_size": 16}},
    "data": {"train": "data/train", "held_out": "data/held_out"},
    "batch": {"samples": 8, "microbatch": 1},
    "optimizer": {"learning_rate": 0.004, "warmup": 0.1},
    "evaluation": {"samples": 8, "times": [0.3, 0.7]},
    "metrics": {"every": 1, "tensorboard": False},
}
RUNS = {
    "two teachers": Run(
        ranks=4,
        recipe={
            "teachers": {
                "moe": teacher("moe", layout={"expert": 4}),
                "dense": teacher("dense", layout=CUT),
            },
            "losses": CE
            | {
                "moe_kl": {"kind": "kl", "teacher": "moe", "weight": 4.0},
                "dense_kl": {"kind": "kl", "teacher": "dense", "weight": 4.0},
            },
        },
    ),
    "two tokenizers": Run(
        ranks=2,
        recipe={
            "teachers": {
                "own": teacher(
                    "own", context={"kind": "bidirectional"}, view="complementary", layout={"expert": 2}
                )
            },
            "noise": {"chunk_hiding": "whole"},
            "losses": CE
            | {
                "calm": {"kind": "calm", "teacher": "own", "temperature": 5.0},
                "reverse": {"kind": "reverse_calm", "teacher": "own", "temperature": 5.0},
            },
        },
    ),
    "tidal": Run(
        ranks=4,
        recipe={
            "teachers": {"dense": teacher("dense", layout=CUT)},
            "losses": CE | {"tidal": {"kind": "tidal", "teacher": "dense", "weight": 16.0, "axes": "both"}},
        },
    ),
    WHOLE: Run(
        ranks=2,
        recipe={
            "steps": 6,
            "teachers": {"moe": teacher("moe", layout={"expert": 2})},
            "losses": CE | {"reverse_kl": {"kind": "reverse_kl", "teacher": "moe"}},
            "checkpoints": {"every": 2, "keep": 9},
        },
    ),
}


class Tree:
    """A source tree, and the folder in which it works."""

    def __init__(self, source: Path, work: Path) -> None:
        """Make the folder with models and chats in it.

        Raises:
            SystemExit: the tree's package is not the one that its commands would import.
        """
        self.source, self.work = source, work
        work.mkdir(parents=True)
        script = "import tide_megatron; print(tide_megatron.__file__)"
        found = self.python("-c", script, folder=work)
        if not Path(found.strip()).is_relative_to(source):
            raise SystemExit(f"not the package of {source} is imported but {found}")
        for name, folder in MODELS.items():
            shutil.copytree(ROOT / folder, work / "models" / name)
        for name, numbers in (("train", range(40)), ("held_out", range(40, 48))):
            text = "".join(json.dumps({"messages": chat(number)}) + "\n" for number in numbers)
            (work / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def tide(self, *words: str, folder: Path | None = None) -> None:
        """Run `tide` of this tree in a folder, else its own."""
        self.python("-m", "tide_megatron.commands", *words, folder=folder or self.work)

    def python(self, *words: str, folder: Path) -> str:
        """Run Python with this tree's package; return what it printed.

        Raises:
            SystemExit: it failed; with all that it said.
        """
        environment = os.environ | {
            "PYTHONPATH": str(self.source),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, *words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} of {self.source} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def prepare(self) -> None:
        """Prepare training and held-out data, with the tokens of the teacher that has its own."""
        for name in ("train", "held_out"):
            words = ["--tokenizer", "models/student", "--max-length", "96", "--teacher", "own=models/own"]
            self.tide("prepare", f"data/{name}", f"{name}.jsonl", *words)

    def numbers(self) -> Numbers:
        """Run everything, and read what came of it."""
        self.prepare()
        columns = [path for path in sorted(self.work.glob("data/*/**/*")) if path.is_file()]
        found: Numbers = {
            "data": {
                f"{TENSOR}{path.relative_to(self.work)}": digest(path.read_bytes())
                for path in columns
                if path.suffix != ".json"
            }
        }
        for name, run in RUNS.items():
            self.tide("train", self.write(name, run), "--ranks", str(run.ranks))
            found[name] = numbers_of(self.work / folder_of(name))
        found[RESUMED] = self.go_on(self.work)
        self.tide("export", str(folder_of(WHOLE)), "exported", "--flavour", "all")
        found["export"] = tensors_below(self.work / "exported")
        return found

    def write(self, name: str, run: Run) -> str:
        """Write a run's recipe; return its file's name in the work folder."""
        recipe = BASE | {"folder": str(folder_of(name))} | dict(run.recipe)
        file = self.work / f"{folder_of(name).name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return file.name

    def go_on(self, other: Path) -> dict[str, str]:
        """Go on from an early checkpoint of the run `WHOLE` in a work folder, in new processes.

        Returns:
            The numbers of the run that was cut, from its first step to the end.
        """
        whole, cut = other / folder_of(WHOLE), other / "runs" / f"gone_on_{self.work.name}"
        shutil.copytree(whole, cut)
        for path in (cut / "checkpoints").glob("step-*"):
            if not path.name.startswith(CUT_AT):
                shutil.rmtree(path)
        shutil.rmtree(cut / "model")
        (cut / "result.json").unlink()
        words = ["--ranks", str(RUNS[WHOLE].ranks), "--folder", str(cut)]
        self.tide("train", f"{whole.name}.yaml", *words, folder=other)
        return numbers_of(cut)


def folder_of(name: str) -> Path:
    """Return the run folder of one of `RUNS`, in the work folder."""
    return Path("runs") / name.replace(" ", "_")


def chat(number: int) -> list[dict[str, str]]:
    """Return a request and a reply whose lengths vary with the number."""
    name = ("add", "join", "count", "reverse", "first")[number % 5]
    body = "".join(f"    x{i} = {number * i}\n" for i in range(number % 4))
    ask = f"{name} {'two or more ' * (number % 3)}{number}"
    return [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": f"def {name}_{number}(a, b):\n{body}    return a + {number}"},
    ]


def numbers_of(folder: Path) -> dict[str, str]:
    """Read a finished run folder: every step's mathematics, scores, the teachers' sanity, the weights."""
    found: dict[str, str] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        names = [name for name in record if name.split("/")[0] in COMPARED]
        if record["kind"] == "evaluate":
            names = [name for name in record if name not in ("kind", "step", "consumed", "skipped", "time")]
        found |= {f"step {record['step']} {name}": repr(record[name]) for name in names}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found |= {name: repr(result[name]) for name in ("clock", "teachers", "finished")}
    return found | tensors_below(folder / "model")


def tensors_below(folder: Path) -> dict[str, str]:
    """Digest every tensor of every safetensors file below a folder, and every other file but prose."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if path.suffix == ".safetensors":
            found |= {f"{TENSOR}{name.parent}/{tensor}": text for tensor, text in tensors_of(path)}
        elif path.suffix != ".md" and path.name != "digests.json":
            found[f"{TENSOR}{name}"] = digest(path.read_bytes())
    return found


def tensors_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name and its dtype, shape and digest; the format is eight bytes, JSON, bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            text = digest(content[start + first : start + last])
            yield name, f"{entry['dtype']}{entry['shape']} {text}"


def digest(content: bytes) -> str:
    """Return SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """Check a commit out in a temporary worktree."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="other_tree_") as folder:
        tree = Path(folder).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), ref], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def print_table(titles: Sequence[str], mine: Numbers, others: Numbers) -> int:
    """Print both sides' numbers beside each other; return how many differ.

    Digests are folded to one line a run, but for those that differ.
    """
    table, different = Table("run", "what", *titles, "", box=None), 0
    for run in dict.fromkeys([*others, *mine]):
        left, right = mine.get(run, {}), others.get(run, {})
        names = list(dict.fromkeys([*right, *left]))
        apart = {name for name in names if left.get(name) != right.get(name)}
        different += len(apart)
        for name in names:
            if name in apart or not name.startswith(TENSOR):
                values = [side.get(name, "missing") for side in (left, right)]
                table.add_row(run, name, *values, "[red]DIFFERS[/]" if name in apart else "")
        tensors = [name for name in names if name.startswith(TENSOR)]
        folded = [
            digest("".join(side.get(name, "") for name in tensors).encode())[:16] for side in (left, right)
        ]
        table.add_row(run, f"{len(tensors)} digests of tensors and files", *folded, "")
    rich.get_console().width = max(rich.get_console().width, 140)
    rich.print(table)
    return different


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--against", metavar="GIT_REF", help="run that commit, too")
    choice.add_argument("--record", type=Path, metavar="FILE", help="write this tree's numbers")
    choice.add_argument("--compare", type=Path, metavar="FILE", help="compare with what --record wrote")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new folder to run in and to leave there")
    options = parser.parse_args()
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_numbers_")))
        here = Tree(ROOT, work.resolve() / "here")
        mine = here.numbers()
        if options.record:
            options.record.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
            print(f"{sum(map(len, mine.values()))} numbers in {options.record}")
            return 0
        if options.compare:
            title, others = options.compare.stem, json.loads(options.compare.read_text(encoding="utf-8"))
        else:
            title = options.against
            there = Tree(stack.enter_context(checked_out(options.against)), work.resolve() / "there")
            others = there.numbers()
            mine[CROSSED] = here.go_on(there.work)
            others[CROSSED] = others[WHOLE]
        mine[f"{RESUMED} = {WHOLE}"], others[f"{RESUMED} = {WHOLE}"] = mine[RESUMED], mine[WHOLE]
    different = print_table(["this tree", title], mine, others)
    total = sum(map(len, others.values()))
    print(f"{different} of {total} numbers differ ({time.monotonic() - start:.0f} s)")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
