"""Data of the cross-tokenizer example: the quickstart's pairs in the teacher's tokens, and in both models'.

    python examples/cross_tokenizer/pairs.py

Made once; a second call finds it and returns. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from data import MAX_LENGTH, TOKENIZER, ensure_columns

from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.text.tokenizer import Tokenizer

TEACHER = Path("examples/cross_tokenizer/models/teacher")
TEXT = Path("runs/quickstart-data/text")
OUT = Path("runs/cross_tokenizer-data")
SIDE = "moe"
"""What the teacher is called in recipes and in the data."""
TEACHER_MAX_LENGTH = 84
"""95 % of the pairs are whole in it; 86 % are in the student's 96."""


def ensure_teacher_data(out: Path = OUT) -> Path:
    """Prepare what the teacher is trained and scored on, below `out / "teacher"`; return that folder."""
    return ensure_columns(out / "teacher", Tokenizer.load(TEACHER), TEACHER_MAX_LENGTH, text=TEXT)


def ensure_pairs(out: Path = OUT) -> Path:
    """Prepare the student's tokens with the teacher's and their chunks beside them; return the folder."""
    side = SideChoice(tokenizer=Tokenizer.load(TEACHER), max_length=TEACHER_MAX_LENGTH)
    student = Tokenizer.load(TOKENIZER)
    return ensure_columns(out / "pairs", student, MAX_LENGTH, text=TEXT, sides={SIDE: side})


def main() -> None:
    """Prepare both."""
    ensure_teacher_data()
    ensure_pairs()


if __name__ == "__main__":
    typer.run(main)
