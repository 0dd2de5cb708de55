"""Hide from every Python below this folder's path what a bare GPU machine would not have.

Python imports `sitecustomize` at its start, from PYTHONPATH: so it holds also in processes that a check
starts. TIDE_HIDDEN_PACKAGES names a file with one importable name a line.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Hidden:
    """A finder that finds that some packages are not there."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Refuse a hidden package; leave all others to the next finder."""
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(
                f"No module named {name!r} (hidden: a bare GPU machine has not got it)", name=name
            )


def asked_first(find_spec: Callable[..., Any], hidden: frozenset[str]) -> Callable[..., Any]:
    """Return `importlib.util.find_spec` as it answers who asks whether a hidden package is there: no."""

    def answer(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in hidden else find_spec(name, package)

    return answer


if file := os.environ.get("TIDE_HIDDEN_PACKAGES"):
    _names = frozenset(Path(file).read_text(encoding="utf-8").split())
    sys.meta_path.insert(0, Hidden(_names))
    importlib.util.find_spec = asked_first(importlib.util.find_spec, _names)
