"""Hide from every Python below this folder's path what a bare GPU machine would not have.

Python imports `sitecustomize` at its start, from PYTHONPATH: so it holds also in processes that a check
starts. TIDE_HIDDEN_PACKAGES names a file with one importable name a line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class Hidden:
    """A finder that finds that some packages are not there."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Refuse a hidden package; leave all others to the next finder."""
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(
                f"No module named {name!r} (hidden: a bare GPU machine has not got it)", name=name
            )


if file := os.environ.get("TIDE_HIDDEN_PACKAGES"):
    sys.meta_path.insert(0, Hidden(Path(file).read_text(encoding="utf-8").split()))
