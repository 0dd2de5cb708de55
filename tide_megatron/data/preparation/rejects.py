"""Bad records: counted by kind in one pass, then a reason to stop, or left out with line and reason."""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.base.unfinished import GrowingFile

logger = logging.getLogger(__name__)
REJECTS_FILE = "rejects.jsonl"
RECORDS_FILE = "rejects.records"
"""Numbers of the listed records among all, int64."""


class OnBad(str, enum.Enum):
    """What to do with a record that cannot be used."""

    STOP = "stop"
    SKIP = "skip"


class TooLong(RecordError):
    """A record of more tokens than `max_length`; `on_long` says what happens to it, not `on_bad`."""

    def __init__(self, tokens: int, max_length: int) -> None:
        """Say how many there are, and how many may be."""
        super().__init__(
            f"{tokens} tokens, max_length is {max_length}: raise max_length to {tokens} or more, "
            "or leave such records out (skip) or cut them (truncate)",
            "longer than max_length",
        )
        self.tokens = tokens


class Rejects:
    """The bad records of one preparation.

    Args:
        folder: of the data that is being written.
        spool: folder of what is needed meanwhile.
        on_bad: whether they end it.
        state: what `state` returned at a commit; None: there are none.
        known: facts of every file that the commit saw.
    """

    def __init__(
        self,
        folder: Path,
        spool: Path,
        on_bad: OnBad,
        state: Mapping[str, Any] | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self._places, self._on_bad, known = (folder / REJECTS_FILE, spool / RECORDS_FILE), on_bad, known or {}
        self._files: list[GrowingFile] = []
        if REJECTS_FILE in known:
            self._files = [GrowingFile(place, known[place.name]) for place in self._places]
        self._kinds: dict[str, list[Any]] = dict(state["kinds"]) if state else {}
        """Kind of fault -> [records, number of the first, its place]."""
        self._longest = int(state["longest"]) if state else 0
        self._reason, self._stopping = "", 0

    @property
    def counts(self) -> dict[str, int]:
        """Records by kind of fault, the most frequent first."""
        return most_frequent(self._kinds)

    @property
    def is_fatal(self) -> bool:
        """Whether nothing will come of this preparation, so that nothing more need be written."""
        return bool(self._stopping)

    def state(self) -> dict[str, Any]:
        """Return the counts, for a commit."""
        return {"kinds": self._kinds, "longest": self._longest}

    def kinds(self) -> dict[str, list[int]]:
        """Return kind of fault -> [records, number of the first]."""
        return {kind: found[:2] for kind, found in self._kinds.items()}

    def sync(self) -> dict[str, tuple[int, str]]:
        """Wait until all is on the disk; return the facts of every file by its name."""
        return {file.path.name: file.sync() for file in self._files}

    def add(self, fault: RecordError, record: int, name: str, place: str, line: int) -> None:
        """Count a bad record.

        Args:
            fault: what is wrong.
            record: its number among all.
            name: of its source, for the list.
            place: source and line, for the message.
            line: its number there.
        """
        self._kinds.setdefault(fault.kind, [0, record, place])[0] += 1
        if isinstance(fault, TooLong):
            self._longest = max(self._longest, fault.tokens)
        if self._on_bad is OnBad.STOP or isinstance(fault, TooLong):
            if not self._stopping:
                self._reason = f"{place}: {fault}"
                logger.warning(
                    "%s; nothing will be written, the rest is read to count all faults", self._reason
                )
            self._stopping += 1
            return
        entry = {"file": name, "line": line, "kind": fault.kind, "reason": str(fault)}
        text = json.dumps(entry, ensure_ascii=False) + "\n"
        self.write(text.encode(errors="backslashreplace"), record)

    def write(self, line: bytes, record: int) -> None:
        """Append a line to the list."""
        self._files = self._files or [GrowingFile(place) for place in self._places]
        self._files[0].write(line)
        self._files[1].write(record.to_bytes(8, "little"))

    def raise_if_fatal(self, records: int) -> None:
        """End the preparation if it must end, once all records were looked at.

        Args:
            records: how many there were.

        Raises:
            DataError: the first fault, and how many of which kinds there are.
        """
        if not self.is_fatal:
            return
        counts = self.counts
        kinds = "; ".join(
            f"{count} {kind}" + f" (first {self._kinds[kind][2]})" * (len(counts) > 1)
            for kind, count in counts.items()
        )
        remedy = "" if set(counts) == {"longer than max_length"} else "--on-bad skip leaves bad ones out"
        longest = f"the longest has {self._longest} tokens" if self._longest else ""
        advice = "; ".join(word for word in (longest, remedy) if word)
        total = sum(counts.values())
        raise DataError(f"{self._reason} [{total} of {records} records are bad: {kinds}; {advice}]")

    def close(self) -> None:
        """Hand what was written to the system."""
        for file in self._files:
            file.close()

    def abandon(self) -> None:
        """Write no more."""
        for file in self._files:
            file.abandon()


def most_frequent(kinds: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Return kind -> records of kind -> [records, first record, ...], the most frequent first."""
    ordered = sorted(kinds, key=lambda kind: (-kinds[kind][0], kinds[kind][1]))
    return {kind: kinds[kind][0] for kind in ordered}
