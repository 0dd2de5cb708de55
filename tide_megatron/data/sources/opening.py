"""Sources that preparation reads: one a file, whatever it holds, as lines of JSON with messages.

Lines of JSON whose first record has messages are handed on as they stand, and judged where they are encoded.
All else is mapped and filtered here, which takes tens of microseconds a row. Reading a list of sources again
from its start, in a list that was opened anew, gives the same lines in the same order, but for pipes: what is
taken and what is a duplicate depends on all that was read before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import ConfigError, DataError, RecordError, nearest
from tide_megatron.base.files import digest_of
from tide_megatron.data.sources import filters as reasons
from tide_megatron.data.sources.choice import OfAll, SourceChoice
from tide_megatron.data.sources.files import files_of
from tide_megatron.data.sources.record import MEANINGFUL, load_row
from tide_megatron.data.sources.shapes import RowMapping
from tide_megatron.data.sources.source import Line, Source
from tide_megatron.data.sources.tables import Row, Table, peek, table_kind

logger = logging.getLogger(__name__)
Judged = tuple[int, Row | bytes | RecordError | str]
"""Number of a row, and its record, or a line to hand on, or what is wrong with it, or why it is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundSources:
    """Which files are read, in this order, and what is asked of their rows."""

    files: tuple[tuple[SourceChoice, tuple[Path, ...]], ...]
    of_all: OfAll = dataclasses.field(default_factory=OfAll)

    def open(self) -> list[ChatSource]:
        """Return one source a file, none read yet; what is kept of one may depend on those before it."""
        seen = reasons.Seen()
        found: list[ChatSource] = []
        for choice, paths in self.files:
            entry = _Entry(choice, self.of_all, seen)
            entry.sources = [ChatSource(path, entry) for path in paths]
            found += entry.sources
        return found

    def said(self) -> list[dict[str, Any]]:
        """Return what is asked, by source, as plain values; of paths only those on the hub."""
        return [{**choice.said(), **self.of_all.said(), "files": len(paths)} for choice, paths in self.files]


def find_sources(
    choices: FoundSources | Sequence[SourceChoice | Path], of_all: OfAll | None = None
) -> FoundSources:
    """Find the files of sources, in the order in which they are read; what was found already stays.

    Args:
        choices: what is said of each, or its path alone.
        of_all: what is asked of the rows of all.

    Raises:
        DataError: a source without files, or of which it must be said which are meant.
        ConfigError: a path that cannot be, or a name that two sources have.
    """
    if isinstance(choices, FoundSources):
        return choices
    chosen = [each if isinstance(each, SourceChoice) else SourceChoice(path=str(each)) for each in choices]
    names = [choice.name for choice in chosen if choice.name is not None]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"sources: two are called {double!r}: give each a name of its own")
    files = tuple((choice, tuple(files_of(choice))) for choice in chosen)
    return FoundSources(files=files, of_all=of_all or OfAll())


class _Entry:
    """What the files of one source share."""

    def __init__(self, choice: SourceChoice, of_all: OfAll, seen: reasons.Seen) -> None:
        self.choice, self.of_all = choice, of_all
        self.filters = (of_all.filters, choice.filters)
        self._asking = tuple(filters for filters in self.filters if not filters.are_of_tokens)
        self.sources: list[ChatSource] = []
        self.told: tuple[Path, str] | None = None
        """The first table, and its shape."""
        self._kept = seen
        self._seen = seen if choice.take is None else reasons.Seen(seen)
        self._taken, self._position = 0, 0
        self._drawn: set[int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether records with messages can be handed on unread."""
        return self.choice.is_plain and self.of_all.is_plain

    @property
    def is_full(self) -> bool:
        """Whether the rows that are left need not be looked at."""
        take, seed = self.choice.take, self.choice.take_seed
        return take is not None and seed is None and self._taken >= take

    def judge(self, row: Row, mapping: RowMapping, seen: reasons.Seen | None = None) -> Row | str:
        """Return a row's record, or why it is left out.

        Args:
            row: as it stands in its file.
            mapping: of its file.
            seen: what counts as seen; None: what was read so far.

        Raises:
            RecordError: it is no conversation.
        """
        for filters in self._asking:
            if reason := reasons.left_out_by_columns(filters, row):
                return reason
        record = mapping.record(row)
        for filters in self._asking:
            if reason := reasons.left_out_by_text(filters, record):
                return reason
        portion = self.of_all.portion
        if self.of_all.dedup or portion is not None:
            digest = reasons.chat_digest(record)
            if portion is not None and not reasons.is_in_portion(digest, portion):
                return reasons.OUTSIDE
            if self.of_all.dedup and not (self._seen if seen is None else seen).add(digest):
                return reasons.DUPLICATE
        return record

    def takes(self, record: Row) -> bool:
        """Say whether the next record that passed all filters is taken."""
        if self.choice.take is None:
            return True
        if self.choice.take_seed is None:
            is_taken = self._taken < self.choice.take
        else:
            is_taken = self._position in self._draw(self.choice.take, self.choice.take_seed)
        self._position += 1
        self._taken += is_taken
        if is_taken and self.of_all.dedup:
            self._kept.add(reasons.chat_digest(record))
        return is_taken

    def prepare_draw(self) -> None:
        """Read all files once, before any is read for good, to know among how many is drawn."""
        if self.choice.take_seed is not None and self._drawn is None:
            seen = reasons.Seen(self._kept)
            found = sum(isinstance(f, dict) for source in self.sources for _, f in source.judged(seen))
            self._drawn = reasons.drawn(range(found), self.choice.take or 0, self.choice.take_seed)

    def _draw(self, number: int, seed: int) -> set[int]:
        assert self._drawn is not None, "drawn before the first file is read"
        return self._drawn


class ChatSource(Source):
    """One file, as lines of JSON with messages.

    Args:
        path: a file or a pipe; `-` is stdin.
        entry: what it shares with the other files of its source.
    """

    def __init__(self, path: Path, entry: _Entry) -> None:
        super().__init__(path)
        self._entry = entry
        self._mapping = RowMapping(entry.choice)
        self.left_out: collections.Counter[str] = collections.Counter()
        """Reason -> rows, of those read so far."""
        self._is_raw = False
        self._digest: tuple[int, str] | None = None
        self._done = 0.0

    @functools.cached_property
    def is_table(self) -> bool:
        """Whether it has rows and no lines."""
        return not self.is_stdin and table_kind(peek(self.path)) is not None

    @property
    def depends_on_earlier(self) -> bool:
        """Whether what is kept of it depends on the sources before it."""
        return self._entry.of_all.dedup or self._entry.choice.take is not None

    @property
    def read_bytes(self) -> int:
        """Bytes taken so far; of a table as many as its rows are of all."""
        return super().read_bytes if self._digest is None else int(self._done * self._digest[0])

    def at(self, number: int) -> str:
        """Return where a row or line stands, for messages."""
        return f"{self.place}: row {number}" if self.is_table else super().at(number)

    def check(self) -> None:
        """Refuse what is not there, and a table whose columns do not fit, before anything is read.

        Raises:
            DataError: says so.
        """
        super().check()
        if self._entry.choice.take_seed is not None and not self.can_be_read_again:
            raise DataError(
                f"{self.place}: take_seed reads a source twice, which a pipe cannot: write a file"
            )
        if self.is_table:
            self._columns(Table(self.path))

    def lines(self) -> Iterator[Line]:
        """Yield (number from 1, a line of JSON, or what is wrong with that row, or why it is left out).

        Raises:
            DataError: it cannot be read, is damaged, or of a kind that is not known.
        """
        self._entry.prepare_draw()
        self.left_out.clear()
        for number, found in self.judged():
            line: bytes | RecordError | str
            if isinstance(found, dict):
                line = as_line(found) if self._entry.takes(found) else reasons.UNTAKEN
            else:
                line = found
            if isinstance(line, str):
                self.left_out[line] += 1
            yield number, line
        self._log()

    def judged(self, seen: reasons.Seen | None = None) -> Iterator[Judged]:
        """Yield what becomes of each row; what is taken is not asked yet.

        Args:
            seen: what counts as seen; None: what was read so far.
        """
        for number, row in self._rows():
            if not isinstance(row, dict):
                yield number, row
                continue
            try:
                yield number, self._entry.judge(row, self._mapping, seen)
            except RecordError as fault:
                yield number, fault

    def sample_left_out(self, tokens: int) -> str | None:
        """Say why a sample of so many tokens is left out; None: it is not."""
        found = (reasons.left_out_by_tokens(filters, tokens) for filters in self._entry.filters)
        return next((reason for reason in found if reason), None)

    def describe(self, records: int) -> dict[str, object]:
        """Describe what was read, how, and what was left out of it."""
        said = super().describe(records)
        if self._digest is not None:
            said |= {"bytes": self._digest[0], "sha256": self._digest[1]}
        if not self._is_raw:
            options, shapes = self._entry.choice.said() | self._entry.of_all.said(), self._mapping.shapes
            said |= {"shape": " ".join(sorted(shapes))} if shapes else {}
            said |= {"options": options} if options else {}
            said |= {"left_out": dict(self.left_out)} if self.left_out else {}
        return said

    def _rows(self) -> Iterator[Judged]:
        """Yield rows as they stand, lines that need no reading, faults, and what is beyond the limit."""
        return self._table_rows() if self.is_table else self._line_rows()

    def _table_rows(self) -> Iterator[Judged]:
        table = Table(self.path)
        columns, total = self._columns(table), table.rows_in_all
        self._digest, self._done = digest_of(self.path), 0.0
        for number, row in table.rows(columns, lambda: self._entry.is_full):
            yield number, reasons.UNTAKEN if row is None else row
            self._done = number / max(number, total or 0)

    def _line_rows(self) -> Iterator[Judged]:
        lines = super().lines()
        first = next(lines, None)
        self._is_raw = self._entry.is_plain and (first is None or _has_messages(first[1]))
        for number, line in itertools.chain([] if first is None else [first], lines):
            if self._is_raw or not isinstance(line, bytes):
                yield number, line
            elif self._entry.is_full:
                yield number, reasons.UNTAKEN
            else:
                yield number, _row_of(line)

    def _columns(self, table: Table) -> list[str]:
        """Return the columns to read of a table.

        Raises:
            DataError: they make no conversation, or not that of the source's other files.
        """
        names, choice = table.types, self._entry.choice
        wheres = {column for filters in self._entry.filters for column in filters.where}
        keys = {column if column in names else column.partition(".")[0] for column in wheres}
        named = [(f"columns.{what}", name) for what, name in choice.columns.names.items()]
        for key, name in [*named, *(("filters.where", key) for key in sorted(keys))]:
            if name not in names:
                raise DataError(f"{self.path}: {key}: no column {name!r}; {nearest(name, names)}")
        try:
            columns = self._mapping.columns_of([*names])
        except RecordError as fault:
            raise DataError(f"{self.path}: {fault}") from None
        for column in (columns.messages, columns.prompt, columns.response):
            if column is not None and (reason := table.unfit(column)):
                raise DataError(
                    f"{self.path}: column {column!r} {reason}: text or a list of messages was expected"
                )
        shape = " ".join(sorted(self._mapping.shapes))
        first, other = self._entry.told = self._entry.told or (self.path, shape)
        if shape != other:
            raise DataError(
                f"{self.path}: has the shape {shape}, {first} has {other}: make two sources of them, or name "
                "the columns"
            )
        used = {*columns.names.values(), *MEANINGFUL, *keys}
        return [name for name in names if name in used]

    def _log(self) -> None:
        if shapes := self._mapping.shapes - {"messages"}:
            logger.info("%s: read as %s", self.place, " and ".join(sorted(shapes)))


def _has_messages(line: bytes | RecordError | str) -> bool:
    """Say whether a first line is for `data.sources.record` to judge: it has messages, or no keys at all."""
    row = _row_of(line) if isinstance(line, bytes) else line
    return not isinstance(row, dict) or "messages" in row


def _row_of(line: bytes) -> Row | bytes | RecordError:
    """Return a line's object; what is none is handed on, and refused where it is encoded."""
    try:
        row = load_row(line)
    except RecordError as fault:
        return fault
    return row if isinstance(row, dict) else line


def as_line(record: Row) -> bytes:
    """Write a record as JSON; what has no JSON (bytes, times) as text."""
    return _JSON.encode(record).encode("utf-8", "surrogatepass")


def _as_text(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


_JSON = json.JSONEncoder(ensure_ascii=False, default=_as_text)
