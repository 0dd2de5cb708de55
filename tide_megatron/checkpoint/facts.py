"""`state.json`: what a checkpoint is, in plain values: clock, recipe, data, versions.

The clock is the whole of loader position, noise clock and schedule: all three are pure functions of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tide_megatron.base.clock import Clock
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.names import STATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run's checkpoints belong to."""

    recipe: dict[str, Any]
    """The resolved recipe."""
    recipe_digest: str
    """Digest of the recipe's mathematics."""
    data: str
    """Digest of the training data's manifest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What state.json says."""

    clock: Clock
    origin: Origin
    megatron_core: str
    """The version that wrote it."""
    ranks: int
    """How many ranks wrote it."""
    optimizer_steps: list[int]
    """Updates that the optimizer has counted: one number, where all parameters agree."""
    metrics: dict[str, float]
    """What the last step before the save measured."""

    @staticmethod
    def now(
        clock: Clock, origin: Origin, optimizer_steps: list[int], metrics: dict[str, float], ranks: int
    ) -> Facts:
        """Return the facts of a checkpoint that is written here and now."""
        return Facts(
            clock=clock,
            origin=origin,
            megatron_core=_here(),
            ranks=ranks,
            optimizer_steps=optimizer_steps,
            metrics=metrics,
        )


def write_facts(folder: Path, facts: Facts) -> None:
    """Write state.json."""
    tree = dataclasses.asdict(facts)
    tree |= tree.pop("origin")
    (folder / STATE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_facts(found: Path) -> Facts:
    """Read a checkpoint's state.json.

    Raises:
        CheckpointError: it cannot be read, or a newer megatron-core wrote the checkpoint.
    """
    try:
        tree = json.loads((found / STATE).read_text(encoding="utf-8"))
        tree["clock"] = Clock(**tree["clock"])
        names = [field.name for field in dataclasses.fields(Origin)]
        facts = Facts(origin=Origin(**{name: tree.pop(name) for name in names}), **tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(f"{found / STATE}: not readable ({fault}); choose another checkpoint") from None
    here = _here()
    if _line(facts.megatron_core) > _line(here):
        raise CheckpointError(
            f"{found} was written by megatron-core {facts.megatron_core}; {here} cannot read it: "
            f"install {facts.megatron_core} or newer"
        )
    return facts


@functools.cache
def _here() -> str:
    return version("megatron-core")


def _line(name: str) -> tuple[int, ...]:
    """Return (major, minor) of a version string."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in name.split(".")[:2])
