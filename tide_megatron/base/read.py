"""Read small files of users: text and JSON, whatever stands under their names.

A file may be a folder, a pipe whose writer never comes, text of another encoding, or brackets without end.
Each is one short reason here, so that every caller can say which file it is and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def text_of(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read; the message is the reason alone.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as fault:
        raise ValueError(f"no UTF-8 text, from byte {fault.start} on") from None
    except OSError as fault:
        raise ValueError(fault.strerror or str(fault)) from None


def json_of(path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value in a JSON file.

    Args:
        path: of the file.
        pairs_hook: makes an object of its entries; None: the last of equal keys counts.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or cannot be read; the message is the reason alone.
    """
    text = text_of(path)
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
        is_whole = not _HALF_A_PAIR.search(text) or is_text(value)  # only an escape can bring half a pair in
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not is_whole:
        raise ValueError("it holds half of a surrogate pair, which is no text")
    return value


def is_text(value: Any) -> bool:
    """Say whether all strings in a JSON value are text: half of a surrogate pair is none."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def doubled_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Return the first key that stands twice among a JSON object's entries: it has no one value."""
    keys = [key for key, _ in pairs]
    return next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
