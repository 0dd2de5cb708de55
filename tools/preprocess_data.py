"""Prepare data from a clone, in the manner of Megatron's script of the same name.

    python tools/preprocess_data.py OUT --tokenizer FOLDER --max-length 512 CHATS.jsonl [MORE.jsonl ...]

The same function stands behind `tide prepare`, which is the better choice where the package is installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tide_megatron import api
from tide_megatron.base.errors import TideError
from tide_megatron.data.preparation.sample import OnLong, SideChoice


def main() -> int:
    """Parse the command line, prepare, and return the exit code (2: a fault the user can fix)."""
    parser = argparse.ArgumentParser(description="JSONL chats -> a prepared data folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FOLDER[,mask=TOKEN]",
        help="folder with tokenizer.json, or that file",
    )
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--on-long", choices=[word.value for word in OnLong], default=OnLong.ERROR.value)
    parser.add_argument("--teacher", action="append", default=[], metavar="NAME=FOLDER[,mask=TOKEN]")
    parser.add_argument("--replace", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        api.prepare(
            options.out,
            options.sources,
            tokenizer=options.tokenizer,
            max_length=options.max_length,
            on_long=options.on_long,
            teachers=dict(SideChoice.split(word) for word in options.teacher),
            replace=options.replace,
        )
    except TideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
