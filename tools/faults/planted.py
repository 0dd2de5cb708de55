"""Planted faults as data: what to replace in which file, and which tests must fail for it.

A fault whose original text is no longer in its file, or stands there more than once, is stale: the list must
follow the code, so a stale fault counts as one that was not caught.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

DATA = Path(__file__).with_name("planted.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One mistake that somebody could make."""

    name: str
    file: str
    original: str
    """Text that stands exactly once in the file."""
    replaced: str
    tests: list[str]
    """Files or test ids; each of them must have a failing test."""

    def complaint(self, root: Path) -> str | None:
        """Say why the fault does not fit the code any more, or None."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        found = path.read_text(encoding="utf-8").count(self.original)
        if found != 1:
            return f"{self.file} holds {found} times {self.original!r}"
        missing = [test for test in self.tests if not (root / test.split("::")[0]).exists()]
        return f"no such tests: {missing}" if missing or not self.tests else None

    def applied(self, text: str) -> str:
        """Return the file's text with the fault in it."""
        return text.replace(self.original, self.replaced)


def read_faults() -> list[Fault]:
    """Read the list, in its order."""
    entries = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return [Fault(name=name, **entry) for name, entry in entries.items()]
