"""The exercises as chats, and as columns with the shipped tokenizer.

    python examples/exercises/exercise_data.py runs/exercises-data

Made once; a second call finds it and returns. Nothing is downloaded. `train` is what base student and
teachers learn from. `noisy` is what the student goes on with: the same questions, but every third answer is
another question's, as chats have mistakes that were not written with care. `dev` is for choices; `test` has
the very questions that the task `exercises` asks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from data import ensure_columns

from tide_megatron.tasks.exercises import Exercise, Exercises, distinct, draw
from tide_megatron.text.tokenizer import Tokenizer

MODELS = Path("examples/exercises/models")
TASK = Exercises()
SEED = TASK.seed
CARD = "corpus.json"
SPLITS = ("train", "noisy", "dev", "test")
LICENCE = "Apache-2.0: drawn by a program"
TRAIN_COUNT = 24_000
WRONG = 1 / 3
"""Share of the answers in `noisy` that are another question's of the same kind."""
MAX_LENGTH = 32
"""Of a question with its answer; the longest has 23 tokens."""


def ensure_exercises(out: Path) -> Path:
    """Write chats and columns below `out` unless they are there and whole; return `out`."""
    if not (out / "text" / CARD).is_file():
        write_exercises(out / "text")
    tokenizer = Tokenizer.load(MODELS / "student")
    return ensure_columns(out, tokenizer, MAX_LENGTH, text=out / "text", splits=SPLITS)


def with_mistakes(exercises: Sequence[Exercise]) -> list[Exercise]:
    """Return exercises of which a share has the answer of another one of its kind."""
    source = random.Random(SEED)
    answers: dict[str, list[str]] = {}
    for one in exercises:
        answers.setdefault(one.kind, []).append(one.answer)
    return [
        dataclasses.replace(one, answer=source.choice(answers[one.kind])) if source.random() < WRONG else one
        for one in exercises
    ]


def write_exercises(out: Path) -> None:
    """Write the splits as chats, and a card with their sizes and digests."""
    out.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {"task": TASK.name, "licence": LICENCE, "seed": SEED, "splits": {}}
    train = list(itertools.islice(draw("train", SEED), TRAIN_COUNT))
    splits = {
        "train": train,
        "noisy": with_mistakes(train),
        **{split: distinct(split, SEED, TASK.count) for split in ("dev", TASK.split)},
    }
    for split, exercises in splits.items():
        lines = [json.dumps({"messages": one.chat(), "source": one.kind}) for one in exercises]
        content = "".join(line + "\n" for line in lines).encode()
        (out / f"{split}.jsonl").write_bytes(content)
        card["splits"][split] = {"chats": len(exercises), "sha256": hashlib.sha256(content).hexdigest()}
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main(out: Path = Path("runs/exercises-data")) -> None:
    """Build the exercises' data below OUT."""
    ensure_exercises(out)


if __name__ == "__main__":
    typer.run(main)
