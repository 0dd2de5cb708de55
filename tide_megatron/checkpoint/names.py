"""What stands in a run's checkpoint folder: `step-STEP-SAMPLES` folders, `latest`, and what is set aside.

A folder that is being written, or taken away, is called `*.partial`; one that was found damaged `*.damaged`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

from tide_megatron.base.clock import Clock

LATEST, STATE, METADATA = "latest", "state.json", ".metadata"
PARTIAL, DAMAGED = ".partial", ".damaged"
_NAME = re.compile(r"step-(\d{8,})-(\d{12,})")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Mark:
    """Where a checkpoint stands, as its name says."""

    consumed: int
    """Samples read."""
    step: int
    """Updates applied."""

    @staticmethod
    def of(path: Path) -> Mark:
        """Read a checkpoint's name, also one that was set aside."""
        found = _NAME.match(path.name)
        assert found, f"{path} is not called step-STEP-SAMPLES"
        return Mark(step=int(found[1]), consumed=int(found[2]))


def name_of(clock: Clock) -> str:
    """Return the name of the checkpoint that stands at a clock."""
    return f"step-{clock.step:08d}-{clock.consumed:012d}"


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=Mark.of)


def remove(path: Path) -> None:
    """Take a checkpoint away so that a kill on the way leaves no half of it under its name."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves left; return the names."""
    names = []
    for path in sorted(folder.glob(f"*{PARTIAL}")) if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        names.append(path.name)
    return names
