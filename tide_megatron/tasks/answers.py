"""Answers on disk, as they come: a folder in which every rank appends to a file of its own.

A line is one answer as JSON. Lines are only appended, and flushed to the disk some at a time, so a kill costs
what is under way: whoever goes on reads what all ranks of all earlier starts have written. A line that a kill
or a full disk cut is no answer; it is cut off when its file is appended to again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError

log = logging.getLogger(__name__)

Answer = Mapping[str, Any]
"""JSON values; `name` names the question."""
_PATTERN = "answers-*.jsonl"
WRITE_SECONDS = 5.0
"""Replies that have ended are judged and written when there is a batch of them, or after this time."""


class AnswerFile:
    """One rank's file in a folder of answers, for appending."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Open it, with what is whole of it.

        Raises:
            OSError: the disk refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"answers-{rank:04d}.jsonl"
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        whole = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._handle, whole)
        os.lseek(self._handle, whole, os.SEEK_SET)

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers and wait until they are on the disk.

        Raises:
            OSError: the disk refuses.
        """
        data = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()
        while data:
            data = data[os.write(self._handle, data) :]
        os.fsync(self._handle)

    def close(self) -> None:
        """Append no more."""
        os.close(self._handle)


def read_answers(folder: Path) -> dict[str, Answer]:
    """Return all whole answers of a folder by name, in the order of names; empty where there is none.

    Raises:
        DataError: a line that is none of ours.
    """
    found: dict[str, Answer] = {}
    for path in sorted(folder.glob(_PATTERN)):
        lines = path.read_bytes().split(b"\n")
        if lines.pop():
            log.info("%s: its last line was cut; that question is asked again", path)
        for number, line in enumerate(lines, start=1):
            try:
                answer = json.loads(line)
                name = answer["name"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}, line {number}: no answer of ours; remove the line, and its question is "
                    "asked again"
                ) from None
            found.setdefault(name, answer)
    return dict(sorted(found.items()))


def count_answers(folder: Path) -> int:
    """Return how many lines all ranks have written, without reading them as JSON."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(_PATTERN))
