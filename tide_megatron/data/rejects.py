"""Bad records: counted by kind in one pass, then a reason to stop, or left out with line and reason."""

from __future__ import annotations

import collections
import enum
import json
import logging
from pathlib import Path

from tide_megatron.base.errors import DataError, RecordError

logger = logging.getLogger(__name__)
REJECTS_FILE = "rejects.jsonl"


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
        on_bad: whether they end it.
    """

    def __init__(self, folder: Path, on_bad: OnBad) -> None:
        self._file, self._on_bad = folder / REJECTS_FILE, on_bad
        self.counts: collections.Counter[str] = collections.Counter()
        """Records by kind of fault."""
        self._first: dict[str, str] = {}
        self._reason, self._longest, self._stopping = "", 0, 0

    @property
    def is_fatal(self) -> bool:
        """Whether nothing will come of this preparation, so that nothing more need be written."""
        return bool(self._stopping)

    def add(self, fault: RecordError, name: str, place: str, line: int) -> None:
        """Count a bad record.

        Args:
            fault: what is wrong.
            name: of its source, for the list.
            place: source and line, for the message.
            line: its number there.
        """
        self.counts[fault.kind] += 1
        self._first.setdefault(fault.kind, place)
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
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def raise_if_fatal(self, records: int) -> None:
        """End the preparation if it must end, once all records were looked at.

        Args:
            records: how many there were.

        Raises:
            DataError: the first fault, and how many of which kinds there are.
        """
        if not self.is_fatal:
            return
        kinds = "; ".join(
            f"{count} {kind}" + f" (first {self._first[kind]})" * (len(self.counts) > 1)
            for kind, count in self.counts.most_common()
        )
        remedy = "" if set(self.counts) == {"longer than max_length"} else "--on-bad skip leaves bad ones out"
        longest = f"the longest has {self._longest} tokens" if self._longest else ""
        advice = "; ".join(word for word in (longest, remedy) if word)
        total = sum(self.counts.values())
        raise DataError(f"{self._reason} [{total} of {records} records are bad: {kinds}; {advice}]")

    def close(self) -> dict[str, int]:
        """Return the counts by kind, the most frequent first."""
        return dict(self.counts.most_common())
