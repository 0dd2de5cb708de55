"""The quickstart's data: docstring -> function pairs from installed sources, with the shipped tokenizer.

    python examples/quickstart/data.py runs/quickstart-data

Made once; a second call finds it and returns. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from corpus import write_corpus

from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.manifest import MANIFEST_FILE
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import OnLong, SideChoice
from tide_megatron.text.tokenizer import Tokenizer

TOKENIZER = Path("examples/quickstart/models/student")
SPLITS = ("train", "dev", "test")
MAX_LENGTH = 96


def ensure_data(out: Path) -> Path:
    """Build corpus and columns below `out` unless they are there and whole; return `out`."""
    return ensure_columns(out, Tokenizer.load(TOKENIZER), MAX_LENGTH, text=out / "text")


def ensure_columns(
    out: Path,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    text: Path,
    sides: Mapping[str, SideChoice] | None = None,
    splits: Sequence[str] = SPLITS,
) -> Path:
    """Prepare splits below `out` from chats below `text`, which are made where they are missing."""
    sides = sides or {}
    digests = {name: side.tokenizer.digest for name, side in sides.items()}
    missing = [name for name in splits if not _is_whole(out / name, tokenizer, digests)]
    if missing and not all((text / f"{name}.jsonl").is_file() for name in missing):
        print("reading docstrings and functions from the installed sources ...", flush=True)
        write_corpus(text)
    for name in missing:
        prepare(
            [text / f"{name}.jsonl"],
            tokenizer,
            out / name,
            max_length=max_length,
            on_long=OnLong.TRUNCATE,
            replace=True,
            sides=sides,
        )
    return out


def _is_whole(folder: Path, tokenizer: Tokenizer, side_digests: Mapping[str, str]) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    columns = PreparedData(folder, tokenizer=tokenizer)
    found = {name: side.tokenizer.digest for name, side in columns.manifest.sides.items()}
    return len(columns) > 0 and found == side_digests


def main(out: Path = Path("runs/quickstart-data")) -> None:
    """Build the quickstart's data below OUT."""
    ensure_data(out)


if __name__ == "__main__":
    typer.run(main)
