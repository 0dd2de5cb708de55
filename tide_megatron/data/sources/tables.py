"""Rows of Parquet and Arrow files, a hundred at a time, in the order in which they stand.

Arrow has a place for every key of a struct in every row and fills it with null where the row had none, so
nulls inside of values are taken out: a message without tool_calls has none. pyarrow is imported when needed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.errors import DataError, RecordError

BATCH = 100
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
"""First bytes."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
EXTRA = "pip install 'tide-megatron[data]'"
Row = dict[str, Any]
_SPARING = {"pre_buffer": False, "buffer_size": 2**20, "page_checksum_verification": True}
"""How Parquet is read: piece by piece, and checked where it says how."""


def table_kind(first: bytes) -> str | None:
    """Name the kind of table that a file's first bytes tell; None: it is none."""
    if first.startswith(PARQUET):
        return "Parquet"
    if first.startswith(ARROW_FILE) or first.startswith(ARROW_STREAM):
        return "Arrow"
    return None


def library(name: str, place: object) -> Any:
    """Import a library of the extra `data`.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{place}: needs the package {package}: {EXTRA}") from None


class Table:
    """A file of rows.

    Args:
        path: Parquet, or Arrow as file or as stream (as `datasets` saves).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            self._first = stream.read(8)
        self._arrow = library("pyarrow", path)
        with self._faults("its beginning or end"):
            self._schema, self.rows_in_all = self._look()

    @property
    def types(self) -> dict[str, Any]:
        """ColumnNames -> Arrow types.

        Raises:
            DataError: two columns have one name.
        """
        names = self._schema.names
        if double := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{self._path}: two columns are called {double!r}: rename one")
        return dict(zip(names, self._schema.types, strict=True))

    def unfit(self, column: str) -> str | None:
        """Say what a column is that can hold no conversation and no part of one; None: it can."""
        kind, types = self.types[column], self._arrow.types
        kind = getattr(kind, "storage_type", kind)
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_null(kind):
            return "holds only nulls"
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return None
        if types.is_struct(kind) and all(types.is_list(field.type) for field in kind):
            return None
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        inner = kind.value_type if is_list else None
        if inner is not None and (types.is_struct(inner) or types.is_map(inner) or types.is_null(inner)):
            return None
        return f"is {kind}"

    def rows(
        self, columns: Sequence[str], skips: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Row | RecordError | None]]:
        """Yield (number from 1, row or what is wrong with it) with these columns, without nulls inside.

        Args:
            columns: to read.
            skips: asked before each batch: the rows need only be counted, and are None.

        Raises:
            DataError: the file is damaged.
        """
        number = 0
        batches = self._batches(list(columns))
        while True:
            with self._faults(f"row {number + 1} or later"):
                batch = next(batches, None)
            if batch is None:
                return
            for row in [None] * batch.num_rows if skips() else self._values(batch):
                number += 1
                yield number, row

    def _look(self) -> tuple[Any, int | None]:
        """Return schema and number of rows; of a stream nobody knows the number yet."""
        if self._first.startswith(PARQUET):
            with importlib.import_module("pyarrow.parquet").ParquetFile(self._path) as file:
                return file.schema_arrow, file.metadata.num_rows
        ipc = importlib.import_module("pyarrow.ipc")
        if self._first.startswith(ARROW_FILE):
            with self._arrow.memory_map(str(self._path)) as data:
                return ipc.open_file(data).schema, None
        if not self._ends_whole():
            raise self._arrow.ArrowInvalid("the mark at its end is missing")
        with self._arrow.memory_map(str(self._path)) as data:
            return ipc.open_stream(data).schema, None

    def _ends_whole(self) -> bool:
        """Say whether a stream was closed: one that was cut between two batches reads well."""
        with self._path.open("rb") as stream:
            stream.seek(-min(len(_END_OF_STREAM), self._path.stat().st_size), 2)
            return stream.read() == _END_OF_STREAM

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        if self._first.startswith(PARQUET):
            parquet = importlib.import_module("pyarrow.parquet")
            with parquet.ParquetFile(self._path, **_SPARING) as file:
                yield from file.iter_batches(batch_size=BATCH, columns=columns, use_threads=False)
            return
        ipc = importlib.import_module("pyarrow.ipc")
        with self._arrow.memory_map(str(self._path)) as data:
            if self._first.startswith(ARROW_FILE):
                file = ipc.open_file(data)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                batches = iter(ipc.open_stream(data))
            for batch in batches:
                chosen = batch.select(columns)
                for start in range(0, chosen.num_rows, BATCH):
                    yield chosen.slice(start, BATCH)

    def _values(self, batch: Any) -> Iterator[Row | RecordError]:
        """Turn a batch into rows; where one is no text, only that one is refused."""
        try:
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield {key: without_nulls(value) for key, value in row.items()}
            return
        except (UnicodeDecodeError, KeyError, ValueError, OverflowError) as fault:
            if batch.num_rows == 1:
                what = "not UTF-8" if isinstance(fault, UnicodeDecodeError) else "a value that cannot be read"
                yield RecordError(f"{what} ({fault}): mend the row", what)
                return
        for position in range(batch.num_rows):
            yield from self._values(batch.slice(position, 1))

    @contextlib.contextmanager
    def _faults(self, where: str) -> Iterator[None]:
        try:
            yield
        except (self._arrow.ArrowException, OSError) as fault:
            said = str(fault).strip().partition("\n")[0].rstrip(".")
            raise DataError(
                f"{self._path}: damaged or cut short, at {where} ({said}): copy it again"
            ) from None


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def peek(path: Path) -> bytes:
    """Return the first bytes of a file; of a pipe none, for they would be gone."""
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(8)
