"""What `tide checkpoint` shows, as plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tide_megatron.base.digests import read_digests
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.units import in_bytes
from tide_megatron.checkpoint.choose import chosen
from tide_megatron.checkpoint.facts import read_facts
from tide_megatron.checkpoint.table import Table


def facts_of(path: Path) -> dict[str, str]:
    """Return what a checkpoint is, one fact a line.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    found = chosen(path)
    facts, table = read_facts(found), Table(found)
    try:
        sizes = [size for size, _ in read_digests(found).values()]
    except ValueError as fault:
        raise CheckpointError(f"{found}: {fault}; see tide checkpoint verify") from None
    clock, origin = facts.clock, facts.origin
    weights = [name for name in table.tensors if not name.startswith("optimizer.")]
    numbers = sum(table.tensors[name].size.numel() for name in weights)
    return {
        "checkpoint": str(found),
        "step": f"{clock.step} of {clock.total_steps}, {clock.skipped} skipped",
        "samples": str(clock.consumed),
        "optimizer steps": ", ".join(map(str, facts.optimizer_steps)),
        "recipe": origin.recipe_digest,
        "data": origin.data,
        "written by": f"megatron-core {facts.megatron_core} on {facts.ranks} ranks",
        "size": f"{in_bytes(sum(sizes))} in {len(sizes)} files",
        "tensors": f"{len(weights)} of the model ({numbers:,} parameters), {len(table.tensors)} in all",
        **{f"metrics {name}": f"{value:.6g}" for name, value in facts.metrics.items()},
    }


def tensors_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, shape and dtype of every tensor."""
    table = Table(chosen(path))
    for name in table.tensors:
        shape = " x ".join(map(str, table.shape(name))) or "scalar"
        yield name, shape, str(table.dtype(name)).removeprefix("torch.")


def differing_facts(one: Path, other: Path) -> Iterator[str]:
    """Yield `key: first -> second` for whatever differs in two checkpoints' facts."""
    left, right = (_flat(dataclasses.asdict(read_facts(path))) for path in (one, other))
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            yield f"{key}: {left.get(key)} -> {right.get(key)}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
