"""Which rows are left out, and why: each reason is counted under its own words.

A conversation's digest is taken of its roles and texts in NFC, with every run of white space as one space:
the same chat under other keys, in another source, is the same chat. Equal ones are found by digests of 16
bytes in a table of numbers, which takes 22 to 43 bytes a conversation, and half as much again while it grows.
"""

from __future__ import annotations

import array
import hashlib
import heapq
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from tide_megatron.data.sources.choice import Filters

_FULL = 0.75
"""Share of a table that is filled before it grows."""
DUPLICATE, OUTSIDE, UNTAKEN = "duplicate", "outside portion", "beyond take"
TOO_FEW_TOKENS, TOO_MANY_TOKENS = "below min_tokens", "above max_tokens"


class Seen:
    """A set of digests, in arrays."""

    def __init__(self, below: Seen | None = None) -> None:
        """Start empty.

        Args:
            below: what was seen before; it is asked and never changed.
        """
        self._below, self._count, self._size = below, 0, 1024
        self._words = array.array("Q", [0]) * (2 * self._size)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        place = self._place(*_words_of(digest))
        return bool(self._words[place + 1]) or (self._below is not None and digest in self._below)

    def add(self, digest: bytes) -> bool:
        """Take in a digest of 16 bytes; say whether it is new."""
        first, second = _words_of(digest)
        place = self._place(first, second)
        if self._words[place + 1] or (self._below is not None and digest in self._below):
            return False
        self._words[place], self._words[place + 1] = first, second
        self._count += 1
        if self._count > _FULL * self._size:
            self._grow()
        return True

    def _place(self, first: int, second: int) -> int:
        """Return where a digest stands, or the empty place where it would."""
        words, place, end = self._words, 2 * (first % self._size), 2 * self._size
        while words[place + 1] and (words[place] != first or words[place + 1] != second):
            place = (place + 2) % end
        return place

    def _grow(self) -> None:
        old = self._words
        self._size *= 2
        self._words = array.array("Q", [0]) * (2 * self._size)
        for position in range(0, len(old), 2):
            first, second = old[position], old[position + 1]
            if second:
                place = self._place(first, second)
                self._words[place], self._words[place + 1] = first, second


def _words_of(digest: bytes) -> tuple[int, int]:
    """Return a digest as two numbers; the second is never 0, which marks an empty place."""
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") or 1


def chat_digest(record: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that equal conversations share, whatever record they stand in."""
    parts = [
        [
            message.get("role"),
            _plain(text_of(message.get("content"))),
            *(message[key] for key in ("reasoning_content", "tool_calls") if message.get(key)),
        ]
        for message in _messages(record)
    ]
    said = json.dumps([parts, record.get("tools") or None], sort_keys=True, default=str)
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plain(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def text_of(content: Any) -> str:
    """Return a message's text as far as it has any; what it may be is for `data.sources.record` to judge."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages")
    return [entry for entry in messages if isinstance(entry, dict)] if isinstance(messages, list) else []


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or of a key below it (`a.b`); None: there is none."""
    value: Any = row
    if column in row:
        return row[column]
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def left_out_by_columns(filters: Filters, row: Mapping[str, Any]) -> str | None:
    """Say why a row is left out by what stands in its columns; None: it is not."""
    for column, wanted in filters.where.items():
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        value = value_at(row, column)
        if not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices
        ):
            return f"{column} is not {' or '.join(json.dumps(choice) for choice in choices)}"
    return None


def left_out_by_text(filters: Filters, record: Mapping[str, Any]) -> str | None:
    """Say why a record is left out by its text; None: it is not."""
    texts = [text_of(message.get("content")) for message in _messages(record)] or [""]
    for name, length in (("chars", sum(map(len, texts))), ("reply_chars", len(texts[-1]))):
        fewest, most = getattr(filters, f"min_{name}"), getattr(filters, f"max_{name}")
        if fewest is not None and length < fewest:
            return f"below min_{name}"
        if most is not None and length > most:
            return f"above max_{name}"
    if filters.reply_contains is not None and filters.reply_contains not in texts[-1]:
        return f"reply without {filters.reply_contains!r}"
    return None


def left_out_by_tokens(filters: Filters, tokens: int) -> str | None:
    """Say why a sample is left out by its length; None: it is not."""
    if filters.min_tokens is not None and tokens < filters.min_tokens:
        return TOO_FEW_TOKENS
    return TOO_MANY_TOKENS if filters.max_tokens is not None and tokens > filters.max_tokens else None


def is_in_portion(digest: bytes, portion: tuple[float, float]) -> bool:
    """Say whether a digest, read as a number of [0, 1), lies in a portion of it."""
    number = hashlib.blake2b(digest, digest_size=8, person=b"tide portion").digest()
    return portion[0] <= (int.from_bytes(number, "big") >> 11) / 2**53 < portion[1]


def drawn(total: Iterable[int], number: int, seed: int) -> set[int]:
    """Draw so many of the numbers, each set of them equally likely; fewer where there are not as many."""
    heap: list[tuple[int, int]] = []
    for position in total:
        key = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
        entry = (-int.from_bytes(key, "big"), position)
        if len(heap) < number:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
    return {position for _, position in heap}
