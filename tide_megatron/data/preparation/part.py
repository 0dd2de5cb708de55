"""One part of data that several tasks prepare: a folder of columns, and part.json, which says what it is.

Beside its columns it keeps the numbers of its records, so that the parts' blocks can be put in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.base.read import json_of
from tide_megatron.data.columns import facts_of
from tide_megatron.data.preparation.origins import ORIGINS_FILE
from tide_megatron.data.preparation.rejects import RECORDS_FILE, REJECTS_FILE

PART_FILE = "part.json"
_FORMAT = "tide-part"


def write_part(folder: Path, content: Mapping[str, Any]) -> None:
    """Write part.json, with the facts of the files that no column is made of.

    Args:
        folder: of the part, otherwise complete.
        content: plain values; `files` are those of the columns.
    """
    extra = [folder / name for name in (ORIGINS_FILE, REJECTS_FILE, RECORDS_FILE) if (folder / name).exists()]
    files = {**content["files"], **{file.name: facts_of(file) for file in extra}}
    written = {"format": _FORMAT, **content, "files": files}
    text = json.dumps({**written, "digest": _digest(written)}, indent=1) + "\n"
    (folder / PART_FILE).write_text(text, encoding="utf-8")


def read_part(folder: Path) -> dict[str, Any]:
    """Read part.json.

    Raises:
        DataError: it is missing, damaged, or was edited.
    """
    try:
        content = json_of(folder / PART_FILE)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no part of prepared data ({PART_FILE} is missing): run its `tide prepare --part`"
        ) from None
    except ValueError as fault:
        raise DataError(f"{folder / PART_FILE}: cannot be read ({fault}): prepare the part again") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{folder / PART_FILE}: describes no part: prepare it again")
    if content.pop("digest", None) != _digest(content):
        raise DataError(f"{folder / PART_FILE}: was edited (its digest differs): prepare the part again")
    return content


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Read every file and compare it with what is said of it.

    Args:
        folder: of the files.
        files: name -> {bytes, sha256}.

    Raises:
        DataError: names the first that differs.
    """
    for name, wanted in files.items():
        file = folder / name
        if not file.is_file() or facts_of(file) != dict(wanted):
            raise DataError(f"{file}: is not what was written: copy the folder again or prepare it again")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
