"""Which checkpoint a user means: a checkpoint's folder, a run's, or the folder of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from tide_megatron.base.digests import DIGESTS
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.names import STATE, listed


def chosen(path: Path) -> Path:
    """Return the checkpoint at a path; of a run's folder, the newest.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE).is_file() or (path / DIGESTS).is_file() or path.name.startswith("step-"):
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint; check the path")
        return path
    found = listed(path / "checkpoints") or listed(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint there; give a run folder or a step-* folder in it")
    return found[-1]
