"""The reference's search for a content among tokens, carried out, with the faults that lead it astray.

It looks for decoded text, from the front or from behind its last hit, and turns characters into tokens (spec
sections 4.1 and 4.2); our data engine knows the place of each content from the template's skeleton.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence

Span = tuple[int, int]

FIRST = "bug 2: first-occurrence search finds an equal text elsewhere"
TRIMMED = "bug 2: the search looks for the content as it was before the template stripped it"
SPLIT = "bug 2: the content ends in a character of several tokens"
EDGE = "spec 4.1: the reference's range takes in a token that reaches over the content's edge"
UNEQUAL = "spec 4.2: the reference pairs unequal ids, which it does not check; ours are equal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What the reference's search finds in one chat."""

    places: list[list[int]]
    """Ranges or chunks [t0, t1, s0, s1], or pairs [t, s]."""
    faults: list[str]
    """What led it astray, where it found something else than is there."""

    @property
    def bug(self) -> str:
        """Name all of that, each once."""
        return "; ".join(dict.fromkeys(self.faults))


@dataclasses.dataclass(frozen=True, eq=False)
class Spelled:
    """A text as tokens, with the characters that each one touches."""

    text: str
    ends: Sequence[int]
    """Byte behind each token."""

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> Spelled:
        """Join the bytes of each token."""
        return cls(b"".join(pieces).decode(errors="replace"), [*itertools.accumulate(map(len, pieces))])

    @functools.cached_property
    def _first_bytes(self) -> list[int]:
        """Byte at which each character starts, and the end."""
        return [*itertools.accumulate((len(character.encode()) for character in self.text), initial=0)]

    def byte(self, character: int) -> int:
        """Return the byte at which a character starts."""
        return self._first_bytes[character]

    @functools.cached_property
    def _characters(self) -> list[Span]:
        """The half-open range of characters that each token touches."""
        return [
            (bisect.bisect_right(self._first_bytes, start) - 1, bisect.bisect_left(self._first_bytes, end))
            for start, end in itertools.pairwise([0, *self.ends])
        ]

    def inside(self, start: int, end: int) -> Span:
        """Return the tokens that lie wholly inside a range of bytes; (0, 0): none."""
        first = bisect.bisect_left([0, *self.ends[:-1]], start)
        last = bisect.bisect_right(self.ends, end)
        return (first, last) if first < last else (0, 0)

    def within(self, start: int, end: int) -> list[int]:
        """List the tokens that touch no character outside a range of characters (spec section 4.2)."""
        return [token for token, (a, b) in enumerate(self._characters) if start <= a < b <= end]

    def searched(self, content: str) -> Span | None:
        """Return the tokens that the reference takes for the first `content` (spec section 4.1)."""
        start = self.text.find(content)
        if start < 0:
            return None
        end, spans = start + len(content), self._characters
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
        if self.byte(found) != start:
            return FIRST
        last = self.byte(self._first_bytes.index(end) - 1)  # where the last character starts
        if any(last < cut < end for cut in self.ends):
            return SPLIT
        return "" if {start, end} <= {0, *self.ends} else EDGE
