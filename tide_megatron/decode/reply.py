"""What a decoded prompt comes to."""

from __future__ import annotations

import dataclasses
from typing import Literal

Ending = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply, or as far as it is known (`on_block`)."""

    ids: tuple[int, ...]
    """Its tokens, without the end token. Those of a reply that a stop text ended go as far as `text` does."""
    text: str
    """Without special tokens, and without the stop text."""
    order: tuple[int, ...]
    """Of each of its tokens: at which forward of the reply, from 0 on, it was committed."""
    ended: Ending | None
    """`eos`: by an end token; `stop`: by a stop text; `length`: it is as long as it may be. None: it goes
    on."""
    forwards: int
    """Forward passes in which it was denoised; with guidance each of them is two."""
