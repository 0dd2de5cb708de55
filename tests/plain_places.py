"""Where texts stand in a rendered chat, found as before that was made fast; see `tests/plain_chat.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tide_megatron.base.errors import RecordError
from tide_megatron.text.templates import REASONING, TEXTS, ChatTemplate, Inputs, Message
from tide_megatron.text.templates.places import Content


def pieces(
    chat: ChatTemplate, messages: Sequence[Message], whole: str, inputs: Inputs | None = None
) -> tuple[list[Content], str]:
    """Find every text in `whole`, the rendered `messages` without a generation prompt.

    Returns:
        Their places in order, and the template text behind the last one.

    Raises:
        RecordError: the template loses, repeats or changes a message; says which.
    """
    texts = [(number, key) for number, message in enumerate(messages) for key in TEXTS if message.get(key)]
    between = _skeleton(chat, messages, texts, whole, inputs)
    # For each text: places where it may start, each with the (place, shown, skipped) that led there.
    paths: list[dict[int, tuple[int, str, int]]] = []
    places = {len(between[0] or "")} if whole.startswith(between[0] or "") else set()
    for (number, key), piece in zip(texts, between[1:], strict=True):
        reached: dict[int, tuple[int, str, int]] = {}
        for place in places:
            for shown, skipped in _shown_forms(messages[number][key]) if piece is not None else [("", 0)]:
                then = piece or ""
                if whole.startswith(shown, place) and whole.startswith(then, place + len(shown)):
                    reached.setdefault(place + len(shown) + len(then), (place, shown, skipped))
        if not reached:
            break
        paths.append(reached)
        places = set(reached)
    if len(paths) < len(texts) or len(whole) not in places:
        number, key = texts[min(len(paths), len(texts) - 1)] if texts else (0, "content")
        text = str(messages[number].get(key, ""))
        raise RecordError(
            f"the chat template ({chat.origin}) loses or changes {_named(messages, number, key)}: "
            f"{_short(text)}" + _hint(text, key),
            "the template changes a message",
        )
    return _walk_back(paths, whole, texts), [piece for piece in between if piece is not None][-1]


def _skeleton(
    chat: ChatTemplate,
    messages: Sequence[Message],
    texts: Sequence[tuple[int, str]],
    whole: str,
    inputs: Inputs | None,
) -> list[str | None]:
    """Return the template text before the first text and behind each; None: a text is not shown."""
    mark = _mark_for(whole)
    marked: list[dict[str, Any]] = [dict(message) for message in messages]
    marks = [f"{mark}{number}\ue001" for number in range(len(texts))]
    for (number, key), own in zip(texts, marks, strict=True):
        others = [name for name in REASONING if name in marked[number]] if key in REASONING else []
        marked[number] |= dict.fromkeys([key, *others], own)
    rest = chat.render(marked, add_generation_prompt=False, inputs=inputs)
    between: list[str | None] = []
    shown: list[str] = []
    for (number, key), own in zip(texts, marks, strict=True):
        is_earlier_thought = key != "content" and number < len(messages) - 1
        count = rest.count(own)
        if count != 1 and not (count == 0 and is_earlier_thought and own not in "".join(shown)):
            verb = "repeats or reorders" if count or own in "".join(shown) else "loses"
            raise RecordError(
                f"the chat template ({chat.origin}) {verb} {_named(messages, number, key)}: "
                "use a template that shows every message once",
                f"the template {verb} a message",
            )
        if count:
            piece, rest = rest.split(own)
            shown.append(piece)
        between.append(piece if count else None)
    return _behind(between, rest)


def _named(messages: Sequence[Message], number: int, key: str) -> str:
    what = "" if key in ("content", "tool_calls") else f"{key} of "
    return f"{what}message {number + 1} ({messages[number]['role']})"


def _hint(text: str, key: str) -> str:
    """Say what most often is behind a changed message."""
    is_inline = key == "content" and "</think>" in text
    return " (write the thought before </think> as reasoning_content)" * is_inline


def _mark_for(whole: str) -> str:
    mark = "\ue000"
    while mark in whole:
        mark += "\ue000"
    return mark


def _behind(between: Sequence[str | None], rest: str) -> list[str | None]:
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


def _shown_forms(content: str) -> Iterator[tuple[str, int]]:
    """Yield what a template may show of a content, the longest first, with the bytes cut at its front."""
    for strip_front in ("", "\n", None):
        front = content.lstrip(strip_front) if strip_front != "" else content
        for strip_back in ("", "\n", None):
            shown = front.rstrip(strip_back) if strip_back != "" else front
            yield shown, len(content[: len(content) - len(front)].encode())


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
        offset += len(whole[characters:start].encode())
        end = offset + len(shown.encode())
        contents.append(Content(start=offset, end=end, skipped=skipped, message=number, key=key))
        characters, offset = start + len(shown), end
    return contents


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
