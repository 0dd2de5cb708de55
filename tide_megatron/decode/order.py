"""In which order the tokens of a reply were committed: its text in cells, and colours for a terminal."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence

from rich.text import Text

from tide_megatron.base.errors import DataError
from tide_megatron.decode.reply import Reply
from tide_megatron.text.tokenizer import Tokenizer

EARLY, MIDDLE, LATE = (253, 231, 37), (53, 183, 121), (113, 95, 182)
"""Colours of the first, the middle and the last forward; black text is read on each of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Tokens that spell whole characters together: one, as a rule; more where a character is cut."""

    text: str
    steps: tuple[int, ...]
    """Of each token: at which forward of the reply, from 0 on, it was committed."""

    @property
    def known_at(self) -> int:
        """The forward after which all of it can be read."""
        return max(self.steps)


def cells(tokenizer: Tokenizer, reply: Reply) -> list[Cell]:
    """Cut a reply into cells. Bytes that spell no character become U+FFFD.

    Args:
        tokenizer: that the reply was written in.
        reply: with the order of its tokens.
    """
    found, steps, text = [], list[int](), ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, step in zip(reply.ids, reply.order, strict=True):
        steps.append(step)
        text += decoder.decode(_bytes_of(tokenizer, token))
        if not decoder.getstate()[0]:
            found.append(Cell(text=text, steps=tuple(steps)))
            steps, text = [], ""
    if steps:
        found.append(Cell(text=text + decoder.decode(b"", final=True), steps=tuple(steps)))
    return found


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except DataError:  # of a tokenizer whose tokens have no bytes of their own
        return tokenizer.decode([token], keep_special=True).encode()


def colour(step: int, forwards: int) -> tuple[int, int, int]:
    """Return red, green and blue (0 to 255) of what was committed at a forward of so many."""
    share = step / max(1, forwards - 1)
    start, end, part = (EARLY, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, LATE, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return red, green, blue


def coloured(found: Sequence[Cell], forwards: int) -> Text:
    """Return a reply for a terminal, each cell on the colour of the forward that made it whole."""
    text = Text()
    for cell in found:
        red, green, blue = colour(cell.known_at, forwards)
        text.append(cell.text, style=f"black on rgb({red},{green},{blue})")
    return text


def legend(forwards: int) -> Text:
    """Return the colours from the first to the last forward, in one line."""
    text = Text("committed first ", style="dim")
    for number in range(16):
        red, green, blue = colour(number, 16)
        text.append(" ", style=f"on rgb({red},{green},{blue})")
    return text.append(f" last, of {forwards} forwards", style="dim")
