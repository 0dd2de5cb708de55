"""Data of the cross-tokenizer example: the quickstart's pairs, in the teacher's tokens.

    python examples/cross_tokenizer/pairs.py

Made once; a second call finds it and returns. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from data import ensure_columns

from tide_megatron.text.tokenizer import Tokenizer

TEACHER = Path("examples/cross_tokenizer/models/teacher")
TEXT = Path("runs/quickstart-data/text")
OUT = Path("runs/cross_tokenizer-data")
TEACHER_MAX_LENGTH = 84
"""95 % of the pairs are whole in it; 86 % are in the student's 96."""


def ensure_teacher_data(out: Path = OUT) -> Path:
    """Prepare what the teacher is trained and scored on, below `out / "teacher"`; return that folder."""
    return ensure_columns(out / "teacher", Tokenizer.load(TEACHER), TEACHER_MAX_LENGTH, text=TEXT)


if __name__ == "__main__":
    typer.run(ensure_teacher_data)
