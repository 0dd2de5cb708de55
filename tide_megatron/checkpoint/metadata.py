"""`state.json`: what a checkpoint is, in plain values: clock, recipe, data, versions.

The clock is the whole of loader position, noise clock and schedule: all three are pure functions of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.read import text_of

STATE = "state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What all checkpoints of a run have in common."""

    recipe: dict[str, Any]
    """The resolved recipe."""
    recipe_digest: str
    """Digest of the recipe's mathematics."""
    data: str
    """Digest of the training data's manifest."""
    contents: dict[str, str] = dataclasses.field(default_factory=dict)
    """Key of a folder in the recipe -> digest of what lay there; empty in checkpoints of old releases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata(RunIdentity):
    """What state.json says; its keys are these fields, in files of every release."""

    clock: Clock
    megatron_core: str
    """The version that was installed."""
    ranks: int
    """How many ranks wrote it."""
    optimizer_steps: list[int]
    """Updates that the optimizer has counted: one number, where all parameters agree."""
    metrics: dict[str, float]
    """What the last step before the save measured."""
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds and processor seconds since the run's first start, and its starts; empty in old releases."""

    @staticmethod
    def now(
        run: RunIdentity,
        clock: Clock,
        optimizer_steps: list[int],
        metrics: dict[str, float],
        ranks: int,
        spent: Mapping[str, float] | None = None,
    ) -> CheckpointMetadata:
        """Return the metadata of a checkpoint that is written here and now."""
        return CheckpointMetadata(
            **vars(run),
            clock=clock,
            megatron_core=_installed(),
            ranks=ranks,
            optimizer_steps=optimizer_steps,
            metrics=metrics,
            spent=dict(spent or {}),
        )

    def write(self, folder: Path) -> None:
        """Write state.json into a folder that is not committed yet."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        (folder / STATE).write_text(text, encoding="utf-8")


def read_metadata(found: Path) -> CheckpointMetadata:
    """Read a checkpoint's state.json.

    Raises:
        CheckpointError: it cannot be read, or a newer megatron-core wrote the checkpoint.
    """
    try:
        metadata = TypeAdapter(CheckpointMetadata).validate_json(text_of(found / STATE))
    except (OSError, ValueError) as fault:
        words = fault.errors()[0] if isinstance(fault, ValidationError) else None
        told = f"{'.'.join(map(str, words['loc']))}: {words['msg']}" if words else fault
        raise CheckpointError(f"{found / STATE}: not readable ({told}); choose another checkpoint") from None
    if _release(metadata.megatron_core) > _release(_installed()):
        raise CheckpointError(
            f"{found} was written by megatron-core {metadata.megatron_core}; {_installed()} cannot read it: "
            f"install {metadata.megatron_core} or newer"
        )
    return metadata


@functools.cache
def _installed() -> str:
    return version("megatron-core")


def _release(name: str) -> tuple[int, ...]:
    """Return (major, minor) of a version string."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in name.split(".")[:2])
