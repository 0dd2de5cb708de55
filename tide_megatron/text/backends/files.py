"""What several kinds of tokenizer folders have in common: names of files, and what the configuration adds.

Special tokens of all kinds but Hugging Face's stand in `tokenizer_config.json` as Hugging Face writes them:
`"added_tokens_decoder": {"151643": {"content": "<|endoftext|>"}, ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.base.read import json_of, text_of

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MODEL_FILE = "tokenizer.model"
ADDED = "added_tokens_decoder"


def read_text(file: Path) -> str:
    """Read text or say which file is at fault.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        return text_of(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); copy the tokenizer again") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object or say which file is at fault.

    Raises:
        DataError: it cannot be read, is no JSON (too deep counts), or no object.
    """
    try:
        content = json_of(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); copy the tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold a JSON object")
    return content


def read_added(config: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Return the special tokens of a configuration: spelling by id.

    Args:
        config: content of `tokenizer_config.json`.
        file: the vocabulary beside it, for messages.

    Raises:
        DataError: an entry is no special token, or two have one spelling.
    """
    entries = config.get(ADDED, {})
    added: dict[int, str] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
        spelling = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(spelling, str) or not spelling:
            raise DataError(
                f'{file.parent / CONFIG_FILE}: {ADDED} must be {{"id": {{"content": "spelling"}}, ...}}, '
                f"not {key!r}: {entry!r}"
            )
        if spelling in added.values():
            raise DataError(f"{file.parent / CONFIG_FILE}: {ADDED} has {spelling!r} twice: remove one")
        added[int(key)] = spelling
    return added


def write_added(special: Mapping[int, str]) -> dict[str, object]:
    """Return what `read_added` reads."""
    return {ADDED: {str(token): {"content": spelling} for token, spelling in sorted(special.items())}}
