"""The byte view of a text: where each token ends, checked against the text itself.

Alignment trusts these offsets blindly, so they are only given where the bytes of the tokens, one behind the
other, are the text. A tokenizer that normalises (NFC is common) fails on text that is not in that form
already; changing the record is the user's decision, not ours.

One difference is allowed: tokenizers of the SentencePiece family put a space in front of a text, or in front
of each stretch between special tokens. The token that carries such a space is shorter by one byte.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tide_megatron.base.errors import DataError

_SHOWN_BYTES = 24


class SpellingError(DataError):
    """Tokens do not spell their text."""

    def __init__(self, message: str, place: int) -> None:
        """Keep the byte of the text where the two part."""
        super().__init__(message)
        self.place = place


def ends_of(
    pieces: Sequence[bytes], is_special: Sequence[bool], text: str, *, who: str, advice: str
) -> list[int]:
    """Return the byte of `text` behind each token.

    Args:
        pieces: bytes of each token.
        is_special: of each token.
        text: what the tokens stand for, in any Unicode form.
        who: the tokenizer, for the message.
        advice: how to fix a tokenizer that changes text, for the message.

    Raises:
        SpellingError: the tokens spell something else; says where, and what to do.
    """
    fitted = _fit(pieces, is_special, text.encode())
    if isinstance(fitted, list):
        return list(itertools.accumulate(fitted))
    place, found = fitted
    shown = text.encode()[place : place + _SHOWN_BYTES]
    raise SpellingError(
        f"{who}: its tokens spell {found[:_SHOWN_BYTES]!r} where the text has {shown!r} (byte {place}): "
        + _remedy(pieces, is_special, text, advice),
        place,
    )


class _Fault(NamedTuple):
    """Where a text and its tokens part, and what the tokens say from there on."""

    place: int
    found: bytes


def _fit(pieces: Sequence[bytes], is_special: Sequence[bool], wanted: bytes) -> list[int] | _Fault:
    """Return how many bytes of the text each token takes."""
    lengths = [len(piece) for piece in pieces]
    if b"".join(pieces) == wanted:
        return lengths
    place = 0
    for first, last in _stretches(is_special):
        stretch = b"".join(pieces[first:last])
        behind = b"".join(pieces[last : last + 1])
        forms = dict.fromkeys((stretch, stretch.removeprefix(b" ")))  # the second: without the space in front
        taken = [form for form in forms if _stands(form + behind, wanted, place, at_end=not behind)]
        if not taken:
            agreed = {form: _agreement(form + behind, wanted[place:]) for form in forms}
            best = max(forms, key=lambda form: agreed[form])
            return _Fault(place + agreed[best], (best + behind)[agreed[best] :])
        if len(taken[0]) < len(stretch):
            lengths[first] -= 1
        place += len(taken[0]) + len(behind)
    return lengths


def _stretches(is_special: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of each run of ordinary tokens around special ones, empty runs too."""
    first = 0
    for place, special in enumerate([*is_special, True]):
        if special:
            yield first, place
            first = place + 1


def _stands(spelt: bytes, wanted: bytes, place: int, *, at_end: bool) -> bool:
    return wanted.startswith(spelt, place) and (not at_end or place + len(spelt) == len(wanted))


def _agreement(left: bytes, right: bytes) -> int:
    """Return how many first bytes are the same."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _remedy(pieces: Sequence[bytes], is_special: Sequence[bool], text: str, advice: str) -> str:
    """Say what to do; name the Unicode form that the tokenizer puts text into, if it is that."""
    for form in ("NFC", "NFKC", "NFD", "NFKD"):
        formed = unicodedata.normalize(form, text)
        if formed != text and isinstance(_fit(pieces, is_special, formed.encode()), list):
            ours = ", prepare with --normalize" * (form == "NFC")
            return f"the tokenizer normalises text to {form}: write the record in {form}{ours}, or {advice}"
    return f"it changes text, so nothing can be aligned: {advice}"
