"""Errors that are written for users: each says what is wrong, where, and what to do.

The command line prints the message of a `TideError` without a traceback and exits with code 2;
every other exception is a bug of ours and keeps its traceback. `assert` is for our own bugs.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_MOST_LISTED = 20  # names of one kind in a message


class TideError(Exception):
    """A fault the user can fix. The message names the key or file, the value, and the remedy."""


class ConfigError(TideError):
    """A recipe, flag or layout that cannot work."""


class DataError(TideError):
    """Records, columns or tokenizers that are broken or disagree."""


class RecordError(DataError):
    """One record that cannot be used, where others can."""

    def __init__(self, message: str, kind: str) -> None:
        """Keep in a few words what is wrong, for counting records of which the same is."""
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes whole, also as what a subclass made of other arguments."""
        return _record_error, (type(self), str(self), self.kind, dict(vars(self)))


def _record_error(
    kind: type[RecordError], message: str, words: str, values: Mapping[str, Any]
) -> RecordError:
    error = kind.__new__(kind)
    RecordError.__init__(error, message, words)
    vars(error).update(values)
    return error


class CheckpointError(TideError):
    """A model folder or checkpoint that is missing, truncated, or of another run."""


class RanksFailed(Exception):
    """A rank ended by a bug or a signal; the message names the rank and holds its traceback."""


class RanksLost(RanksFailed):
    """A rank was killed or stood still: nothing is known against the run, and the same command goes on."""

    def __init__(self, message: str, host: str = "") -> None:
        """Keep which host it was on; empty: nobody knows."""
        super().__init__(message)
        self.host = host


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from or during, the last one first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def last_line(fault: BaseException) -> str:
    """Return the last words of a library's complaint, which may hold whole tracebacks of other ranks."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[-1]}" if lines else type(fault).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint that names the closest legal choice, for the end of an error message.

    Args:
        word: what the user wrote.
        choices: all legal words; when none is close, all of them are listed.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(names)}"


def some_of(names: Sequence[str]) -> str:
    """Return names for a message: the first of them, and how many more there are."""
    more = f", and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


@contextlib.contextmanager
def under(key: str) -> Iterator[None]:
    """Put the key of the recipe's part before what a lower layer says of its field."""
    try:
        yield
    except ConfigError as fault:
        raise ConfigError(f"{key}.{fault}") from None
