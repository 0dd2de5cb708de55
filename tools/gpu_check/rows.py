"""What a check is given and what it finds. Standard library only: the parent process never imports torch."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["passed", "failed", "missed", "not measured"]
"""`missed`: measured and right, but slower than a goal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    text: str
    """What was seen, in a sentence."""
    verdict: Verdict = "passed"
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was measured; plain JSON values."""
    seconds: float = 0.0
    """Of the check that this row belongs to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check runs."""

    device: Literal["cuda", "cpu"]
    assets: Path
    scratch: Path
    """A folder of its own, empty."""
    transformer_engine: Path | None = None
    """A folder for the path of those checks that want Transformer Engine; None: there is none here."""

    @property
    def is_rehearsal(self) -> bool:
        """Whether there is no GPU: smaller shapes, gloo, and what only CUDA has is not measured."""
        return self.device == "cpu"


def fresh_processes(place: Place) -> Any:
    """Return how a check starts processes of its own: a `multiprocessing` context.

    Beside CUDA, which survives no fork, they are spawned; on a CPU forked, where everything is imported.
    """
    return multiprocessing.get_context("spawn" if place.device == "cuda" else "fork")


class NotMeasured(Exception):
    """A check cannot be made here; the message says why."""


def judged(check: str, text: str, faults: list[str], **figures: Any) -> Row:
    """Return a row that failed if there are faults, which then follow the text."""
    if faults:
        return Row(check=check, verdict="failed", text=f"{text}; {'; '.join(faults)}", figures=figures)
    return Row(check=check, text=text, figures=figures)
