"""How many bytes our own collectives bring to this rank, by kind: what the log shows and a plan predicts.

Counted is what arrives from OTHER ranks, in the form in which it travels (pads included), at the very place
where the collective is called: `parallel.exchange` is the only writer. What megatron-core sends inside a
model (tensor sums, pipeline stages, experts) is not in it; `collectives.Traffic` sees it, and slows a run.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

Kind = Literal["collect", "deliver", "rows", "statistics", "gradients"]
"""Views to a replica's seats; a teacher's rows to the head group; the student's rows to it; packed numbers of
the vocabulary-parallel softmax, forward and backward; gradients of rows back to their owners."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Ledger:
    """Bytes and calls by kind since the last `take`."""

    def __init__(self) -> None:
        """Start at zero."""
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, kind: Kind, num_bytes: int) -> None:
        """Count one collective that brought so many bytes from other ranks."""
        self.bytes[kind] += num_bytes
        self.calls[kind] += 1

    def take(self) -> dict[Kind, int]:
        """Return the bytes of every kind, zero included, and start again."""
        taken: dict[Kind, int] = {kind: self.bytes[kind] for kind in KINDS}
        self.bytes.clear()
        self.calls.clear()
        return taken


LEDGER = Ledger()
"""Of this process: what travels is a property of the process, like its memory."""
