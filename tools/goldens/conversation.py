"""One recorded conversation in one tokenizer: where its contents stand, and where the reference finds them.

Our data engine knows the place of each content from the template's skeleton. The reference searches decoded
text, from the front or from behind its last hit, and turns characters into tokens (spec sections 4.1, 4.2).
That rule is carried out here, and so is a sound one that shares no code with the engine: a difference is a
named fault's only if both sides of it are as they should be.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tide_megatron.text.chat import Encoded, encode_chat
from tide_megatron.text.tokenizer import Tokenizer

Span = tuple[int, int]

FIRST = "bug 2: first-occurrence search finds an equal text elsewhere"
TRIMMED = "bug 2: the search looks for the content as it was before the template stripped it"
EDGE = "spec 4.1: the reference's range takes in a token that reaches over the content's edge"
UNEQUAL = "spec 4.2: the reference pairs unequal ids, which it does not check; ours are equal"
SPLIT = "bug 2: the content ends in a character of several tokens"


@dataclasses.dataclass(frozen=True, eq=False)
class Spelled:
    """A text as tokens, with the characters that each one touches."""

    text: str
    ends: Sequence[int]
    """Byte behind each token."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int]) -> Spelled:
        """Spell ids out."""
        pieces = [tokenizer.token_bytes(token) for token in ids]
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        return cls(b"".join(pieces).decode(errors="replace"), ends[1:])

    @functools.cached_property
    def _first_bytes(self) -> list[int]:
        """Byte at which each character starts, and the end."""
        starts = [0]
        for character in self.text:
            starts.append(starts[-1] + len(character.encode()))
        return starts

    def characters(self, token: int) -> Span:
        """Return the half-open range of characters that a token touches."""
        start = self.ends[token - 1] if token else 0
        first = bisect.bisect_right(self._first_bytes, start) - 1
        return first, bisect.bisect_left(self._first_bytes, self.ends[token])

    def byte(self, character: int) -> int:
        """Return the byte at which a character starts."""
        return self._first_bytes[character]

    def character(self, byte: int) -> int:
        """Return the character that starts at a byte."""
        return self._first_bytes.index(byte)

    def inside(self, start: int, end: int) -> Span:
        """Return the tokens that lie wholly inside a range of bytes; (0, 0): none."""
        first = bisect.bisect_left([0, *self.ends[:-1]], start)
        last = bisect.bisect_right(self.ends, end)
        return (first, last) if first < last else (0, 0)

    def within(self, start: int, end: int) -> list[int]:
        """List the tokens that touch no character outside a range of characters (spec section 4.2)."""
        spans = ((token, *self.characters(token)) for token in range(len(self.ends)))
        return [token for token, a, b in spans if start <= a < b <= end]

    def searched(self, content: str) -> Span | None:
        """Return the tokens that the reference takes for the first `content` (spec section 4.1)."""
        start = self.text.find(content)
        if start < 0:
            return None
        end = start + len(content)
        spans = [self.characters(token) for token in range(len(self.ends))]
        firsts = (token for token, (a, b) in enumerate(spans) if a <= start < b)
        lasts = (token + 1 for token, (a, b) in enumerate(spans) if a < end <= b)
        passed = (token for token, (a, _) in enumerate(spans) if a >= end)
        first, last = next(firsts, None), next(lasts, next(passed, None))
        return None if first is None or last is None else (first, last)

    def fault(self, content: str, place: Span, behind: int = 0) -> str:
        """Name what leads the reference's search astray; empty: nothing does.

        Args:
            content: what it looks for.
            place: where that stands, in bytes.
            behind: character at which the search starts.
        """
        start, end = place
        found = self.text.find(content, behind)
        if found < 0:
            return TRIMMED
        if found != self.character(start):
            return FIRST
        last = self.byte(self.character(end) - 1)  # where the last character starts
        if any(last < cut < end for cut in self.ends):
            return SPLIT
        return "" if {start, end} <= {0, *self.ends} else EDGE


class Place(NamedTuple):
    """Where a content stands in a rendered text, in bytes, and how much of its front is not shown."""

    start: int
    end: int
    skipped: int


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """One conversation in one tokenizer."""

    tokenizer: Tokenizer
    messages: Sequence[Mapping[str, str]]

    @functools.cached_property
    def encoded(self) -> Encoded:
        """Its tokens, uncut."""
        return encode_chat(self.tokenizer, self.messages, aligned=True)

    @functools.cached_property
    def spelled(self) -> Spelled:
        """Its rendered text."""
        return Spelled.of(self.tokenizer, self.encoded.ids)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - lives as long as one replay
    def place(self, message: int) -> Place:
        """Find a content as the stretch of text that changes with it: our data engine has no part in this."""
        content, text = self.messages[message]["content"], self.spelled.text
        other = [*self.messages]
        other[message] = {**self.messages[message], "content": "\ue0ff"}
        assert self.tokenizer.chat is not None, "golden tokenizers have one"
        changed = self.tokenizer.chat.render(other, add_generation_prompt=False)
        start = _alike(text, changed)
        end = len(text) - _alike(text[::-1], changed[::-1])
        skipped = len(content[: content.index(text[start:end])].encode())
        return Place(self.spelled.byte(start), self.spelled.byte(end), skipped)

    def range_of(self, message: int) -> Span:
        """Return the tokens wholly inside a content, by the place that our data engine knows."""
        content, ends = self.encoded.contents[message], self.encoded.ends
        return Spelled(self.spelled.text, ends).inside(content.start, content.end)

    def sound_range(self, message: int) -> Span:
        """Return the tokens wholly inside a content, by `place`."""
        place = self.place(message)
        return self.spelled.inside(place.start, place.end)

    def pieces(self, message: int) -> tuple[Span, list[bytes], int]:
        """Return those tokens, their bytes, and the bytes of the original content before them."""
        place, (first, last) = self.place(message), self.sound_range(message)
        before = (self.spelled.ends[first - 1] if first else 0) - place.start + place.skipped
        pieces = [self.tokenizer.token_bytes(token) for token in self.encoded.ids[first:last]]
        return (first, last), pieces, before

    def searched(self, message: int) -> Span | None:
        """Return where the reference sees a content."""
        return self.spelled.searched(self.messages[message]["content"])

    def text_of(self, span: Span) -> str:
        """Decode a range as the reference does when it compares both sides."""
        return self.tokenizer.decode(self.encoded.ids[slice(*span)], keep_special=True)

    def fault(self, message: int, behind: int = 0) -> str:
        """Name what leads the reference's search for one message astray; empty: nothing does."""
        place = self.place(message)
        return self.spelled.fault(self.messages[message]["content"], (place.start, place.end), behind)


def _alike(one: str, other: str) -> int:
    """Count the characters at the front that two texts share."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
