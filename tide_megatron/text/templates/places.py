"""Where the texts of a conversation stand in what a template wrote: its skeleton, filled.

A skeleton is the template text before, between and behind the texts. Templates show a text as it is or with
its ends stripped, so a text has several forms; the places that a path of forms can lead to are followed
through the whole conversation, and the path that ends where the text ends is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MARK = "\ue000"
"""Begins what stands for a text where a skeleton is rendered."""


class Content(NamedTuple):
    """The place of one text of a conversation in the rendered text, in bytes of UTF-8."""

    start: int
    end: int
    skipped: int
    """Bytes of the original text that the template stripped from its front: byte b of the rendered text is
    byte `skipped + b - start` of the original."""
    message: int = 0
    """Whose it is, by index."""
    key: str = "content"
    """What it is of that message: one of `TEXTS`."""


def fill(
    between: Sequence[str | None],
    texts: Sequence[tuple[int, str]],
    messages: Sequence[Mapping[str, Any]],
    whole: str,
) -> list[Content] | int:
    """Find the place of every text.

    Args:
        between: template text before the first text and behind each; None: a text is not shown.
        texts: (message, key) of each.
        messages: the conversation.
        whole: what the template wrote of it.

    Returns:
        The places in order; or, where the texts do not fill the skeleton to the whole, how many do.
    """
    if (found := _as_they_are(between, texts, messages, whole)) is not None:
        return found
    # For each text: places where it may start, each with the (place, shown, skipped) that led there.
    paths: list[dict[int, tuple[int, str, int]]] = []
    places = {len(between[0] or "")} if whole.startswith(between[0] or "") else set()
    for (number, key), piece in zip(texts, between[1:], strict=True):
        reached: dict[int, tuple[int, str, int]] = {}
        then = piece or ""
        forms = _shown_forms(messages[number][key]) if piece is not None else [("", 0)]
        for place in places:
            for shown, skipped in forms:
                if whole.startswith(shown, place) and whole.startswith(then, place + len(shown)):
                    reached.setdefault(place + len(shown) + len(then), (place, shown, skipped))
        if not reached:
            return len(paths)
        paths.append(reached)
        places = set(reached)
    return _walk_back(paths, whole, texts) if len(whole) in places else len(paths)


def _as_they_are(
    between: Sequence[str | None],
    texts: Sequence[tuple[int, str]],
    messages: Sequence[Mapping[str, Any]],
    whole: str,
) -> list[Content] | None:
    """Return the places where every text is shown and has no ends to strip, so that there is one way only."""
    contents, written = [], [between[0] or ""]
    place = _bytes_of(written[0])
    for (number, key), piece in zip(texts, between[1:], strict=True):
        text = messages[number][key]
        if piece is None or len(text) != len(text.strip()):
            return None
        end = place + _bytes_of(text)
        contents.append(Content(start=place, end=end, skipped=0, message=number, key=key))
        written += (text, piece)
        place = end + _bytes_of(piece)
    return contents if "".join(written) == whole else None


def mark_for(whole: str) -> str:
    """Return a mark that a text does not hold."""
    mark = MARK
    while mark in whole:
        mark += MARK
    return mark


def behind(between: Sequence[str | None], rest: str) -> list[str | None]:
    """Turn the template text before each shown text into that before the first and behind each.

    Args:
        between: before each text; None: it is not shown.
        rest: behind the last shown one.
    """
    places = [place for place, piece in enumerate(between) if piece is not None]
    behind: list[str | None] = [None] * len(between)
    if not places:
        return [rest, *behind]
    for place, following in zip(places, [*places[1:], len(between)], strict=True):
        behind[place] = between[following] if following < len(between) else rest
    return [between[places[0]], *behind]


def _shown_forms(content: str) -> Sequence[tuple[str, int]]:
    """Return what a template may show of a content, the longest first, with the bytes cut at its front."""
    if content == content.strip():
        return [(content, 0)]
    forms: dict[tuple[str, int], None] = {}
    for strip_front in ("", "\n", None):
        front = content.lstrip(strip_front) if strip_front != "" else content
        for strip_back in ("", "\n", None):
            shown = front.rstrip(strip_back) if strip_back != "" else front
            forms[shown, len(content[: len(content) - len(front)].encode())] = None
    return list(forms)


def _walk_back(
    paths: Sequence[Mapping[int, tuple[int, str, int]]], whole: str, texts: Sequence[tuple[int, str]]
) -> list[Content]:
    """Follow the places from the end of the text to its start."""
    found = []
    place = len(whole)
    for reached in reversed(paths):
        start, shown, skipped = reached[place]
        place = start
        found.append((start, shown, skipped))
    contents, characters, offset = [], 0, 0
    for (start, shown, skipped), (number, key) in zip(reversed(found), texts, strict=True):
        # Count the bytes of every stretch once.
        offset += _bytes_of(whole[characters:start])
        end = offset + _bytes_of(shown)
        contents.append(Content(start=offset, end=end, skipped=skipped, message=number, key=key))
        characters, offset = start + len(shown), end
    return contents


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
