"""Where each message's content stands in a rendered chat, found without searching for it.

The template is rendered once more with a marker in the place of every content. What stands between the
markers is the skeleton; the contents, as they are or with their ends stripped, must fill it to the very text
that the template really wrote. So a message that repeats another, or a word of the template, cannot be
found in the wrong place (the reference searches decoded text, spec section 4.1), and a template that loses,
changes or repeats a message is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tide_megatron.base.errors import DataError

if TYPE_CHECKING:
    from tide_megatron.text.chat import ChatTemplate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """The place of one message's content in the rendered text, in bytes of UTF-8."""

    start: int
    end: int
    skipped: int
    """Bytes of the original content that the template stripped from its front: byte b of the text is byte
    `skipped + b - start` of the content."""


def find_contents(template: ChatTemplate, messages: Sequence[Mapping[str, str]], whole: str) -> list[Content]:
    """Find all contents in `whole`, what the template makes of `messages` without a generation prompt.

    Raises:
        DataError: the template loses, repeats or changes a message; says which.
    """
    pieces = _cut_skeleton(template, messages, whole)
    # For each message the places where it may start, each with the (place, shown, skipped) that led there.
    paths: list[dict[int, tuple[int, str, int]]] = []
    places = {len(pieces[0])} if whole.startswith(pieces[0]) else set()
    for message, piece in zip(messages, pieces[1:], strict=True):
        reached: dict[int, tuple[int, str, int]] = {}
        for place in places:
            for shown, skipped in _shown_forms(message["content"]):
                if whole.startswith(shown, place) and whole.startswith(piece, place + len(shown)):
                    reached.setdefault(place + len(shown) + len(piece), (place, shown, skipped))
        if not reached:
            break
        paths.append(reached)
        places = set(reached)
    if len(paths) < len(messages) or len(whole) not in places:
        number = min(len(paths), len(messages) - 1)
        raise DataError(
            f"the chat template ({template.origin}) loses or changes message {number + 1} "
            f"({messages[number]['role']}): {_short(messages[number]['content'])}"
        )
    return _walk_back(paths, whole)


def _cut_skeleton(template: ChatTemplate, messages: Sequence[Mapping[str, str]], whole: str) -> list[str]:
    """Return the template text around the contents: one piece more than messages."""
    mark = "\ue000"
    while mark in whole:
        mark += "\ue000"
    marks = [f"{mark}{number}\ue001" for number in range(len(messages))]
    marked = [{**message, "content": own} for message, own in zip(messages, marks, strict=True)]
    rest = template.render(marked, add_generation_prompt=False)
    pieces: list[str] = []
    for number, own in enumerate(marks):
        if rest.count(own) != 1:
            verb = "repeats or reorders" if own in rest or own in "".join(pieces) else "loses"
            raise DataError(
                f"the chat template ({template.origin}) {verb} message {number + 1} "
                f"({messages[number]['role']}): use a template that shows every message once"
            )
        piece, rest = rest.split(own)
        pieces.append(piece)
    return [*pieces, rest]


def _shown_forms(content: str) -> Iterator[tuple[str, int]]:
    """Yield what a template may show of a content, the longest first, with the bytes cut at its front."""
    for strip_front in ("", "\n", None):
        front = content.lstrip(strip_front) if strip_front != "" else content
        for strip_back in ("", "\n", None):
            shown = front.rstrip(strip_back) if strip_back != "" else front
            yield shown, len(content[: len(content) - len(front)].encode())


def _walk_back(paths: Sequence[Mapping[int, tuple[int, str, int]]], whole: str) -> list[Content]:
    """Follow the places from the end of the text to its start."""
    found = []
    place = len(whole)
    for reached in reversed(paths):
        start, shown, skipped = reached[place]
        place = start
        found.append((start, shown, skipped))
    contents, characters, offset = [], 0, 0
    for start, shown, skipped in reversed(found):  # count the bytes of every stretch once
        offset += len(whole[characters:start].encode())
        end = offset + len(shown.encode())
        contents.append(Content(start=offset, end=end, skipped=skipped))
        characters, offset = start + len(shown), end
    return contents


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
