"""The byte view of a text: where each token ends, checked against the text itself.

Alignment trusts these offsets blindly, so they are only given where the bytes of the tokens, one behind the
other, are the text. A tokenizer that normalises (NFC is common) fails on text that is not in that form
already; changing the record is the user's decision, not ours.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tide_megatron.base.errors import DataError

if TYPE_CHECKING:
    from tide_megatron.text.tokenizer import Tokenizer

_SHOWN_BYTES = 24


def spell(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return the byte of `text` behind each token.

    Args:
        tokenizer: whose ids they are.
        ids: what it makes of `text`.
        text: in any Unicode form.

    Raises:
        DataError: the tokens spell something else; says where, and what to do.
    """
    pieces = [tokenizer.token_bytes(token) for token in ids]
    written, wanted = b"".join(pieces), text.encode()
    if written != wanted:
        raise DataError(_complaint(tokenizer, written, wanted, text))
    return list(itertools.accumulate(len(piece) for piece in pieces))


def _complaint(tokenizer: Tokenizer, written: bytes, wanted: bytes, text: str) -> str:
    """Say where tokens and text part, and whether a Unicode form would mend it."""
    place = next(
        (at for at, (left, right) in enumerate(zip(written, wanted, strict=False)) if left != right),
        min(len(written), len(wanted)),
    )
    shown = [raw[max(0, place - 8) : place + _SHOWN_BYTES] for raw in (wanted, written)]
    start = f"{tokenizer.name}: its tokens spell {shown[1]!r} where the text has {shown[0]!r} (byte {place})"
    for form in ("NFC", "NFKC"):
        if written == unicodedata.normalize(form, text).encode():
            return f"{start}: the tokenizer normalises text to {form}; write the record in {form}"
    return f"{start}: it changes text, so nothing can be aligned; use another tokenizer or mend the record"
