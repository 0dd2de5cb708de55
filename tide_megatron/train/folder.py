"""The run folder: whose it is, and what stands in it.

recipe.yaml     the resolved recipe
metrics.jsonl   what was measured, one record a line
checkpoints/    step-* and `latest`
model/          the student in Hugging Face form, written at the end
result.json     held-out scores and costs, written at the end
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tide_megatron.base.errors import CheckpointError, ConfigError
from tide_megatron.train.resolve import Tree, difference, digest

RECIPE, CHECKPOINTS, MODEL, RESULT = "recipe.yaml", "checkpoints", "model", "result.json"
_OURS = (RECIPE, CHECKPOINTS, MODEL, RESULT, "metrics.jsonl", "tensorboard", "wandb")


def claim_folder(folder: Path, tree: Tree, *, resume: bool) -> None:
    """Make or take a run folder on rank 0 (only rank 0 calls it).

    Args:
        folder: the run folder.
        tree: the resolved recipe.
        resume: go on from what is there; False discards what earlier runs of ours left in it.

    Raises:
        CheckpointError: the folder belongs to another recipe.
        ConfigError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in _OURS:
                _remove(folder / name)
        written = folder / RECIPE
        if written.is_file():
            old = yaml.safe_load(written.read_text(encoding="utf-8"))
            if not isinstance(old, dict) or not _is_same(old, tree):
                changed = (
                    "\n  ".join(difference(old, tree)) if isinstance(old, dict) else f"{RECIPE} is damaged"
                )
                raise CheckpointError(
                    f"folder: {folder} holds the run of another recipe:\n  {changed}\n"
                    "use another folder=, the old values, or --fresh to discard the old run"
                )
        written.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    except OSError as fault:
        raise ConfigError(f"folder: {folder} cannot be used: {fault}; choose another folder=") from None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json in one rename (only rank 0 calls it)."""
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / RESULT)


def _is_same(old: Tree, new: Tree) -> bool:
    try:
        return digest(old) == digest(new)
    except (KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
