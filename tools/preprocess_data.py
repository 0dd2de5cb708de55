"""Prepare data from a clone, in the manner of Megatron's script of the same name.

    python tools/preprocess_data.py OUT --tokenizer FOLDER --max-length 512 CHATS.jsonl [MORE.jsonl ...]

The same function stands behind `tide prepare`, which is the better choice where the package is installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tide_megatron.base.errors import TideError
from tide_megatron.data.prepare import OnLong, prepare
from tide_megatron.text.tokenizer import Tokenizer


def main() -> int:
    """Parse the command line, prepare, and return the exit code (2: a fault the user can mend)."""
    parser = argparse.ArgumentParser(description="JSONL chats -> a prepared data folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with tokenizer.json, or that file"
    )
    parser.add_argument("--mask", default="<|mask|>", help="mask token; added where the tokenizer lacks it")
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--on-long", choices=[word.value for word in OnLong], default=OnLong.ERROR.value)
    parser.add_argument("--replace", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        prepare(
            options.sources,
            Tokenizer.load(options.tokenizer, mask=options.mask),
            options.out,
            max_length=options.max_length,
            on_long=options.on_long,
            replace=options.replace,
        )
    except TideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
