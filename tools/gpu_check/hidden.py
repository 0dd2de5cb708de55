"""Which installed packages a bare GPU machine would not have: a rehearsal runs without them.

So a new dependency of anything that a check reaches, also of a deferred import, fails in `make test`, not on
the day when there is a GPU. Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PACK = ("megatron-core", "transformer-engine", "omegaconf", "pydantic")
"""What the pack brings; what these require comes with them."""


def machine_packages() -> set[str]:
    """Return the distributions that a bare machine was seen with."""
    lines = (HERE / "machine_packages.txt").read_text(encoding="utf-8").splitlines()
    return {_normal(line) for line in lines if line and not line.startswith("#")}


def hidden_names() -> list[str]:
    """Return the importable names of installed packages that are neither there nor in the pack."""
    there = machine_packages() | _with_requirements(PACK) | {"tide-megatron"}
    owners = importlib.metadata.packages_distributions()
    hidden = {name for name, found in owners.items() if not there.intersection(map(_normal, found))}
    return sorted(hidden - _brought_along())


def _brought_along() -> set[str]:
    """Return what setuptools brings in a folder of its own, and finds there where nobody installed it."""
    folder = Path(str(importlib.metadata.distribution("setuptools").locate_file("setuptools/_vendor")))
    return {path.stem for path in folder.iterdir()} if folder.is_dir() else set()


def hide(folder: Path) -> dict[str, str]:
    """Return the environment in which Python has only what a bare machine has; `folder` keeps the list."""
    file = folder / "hidden.txt"
    file.write_text("\n".join(hidden_names()), encoding="utf-8")
    path = [str(HERE / "bare"), os.environ.get("PYTHONPATH", "")]
    return {"TIDE_HIDDEN_PACKAGES": str(file), "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Return distributions and all that they require without extras, as far as it is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
