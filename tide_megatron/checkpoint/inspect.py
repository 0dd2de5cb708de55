"""Look into a checkpoint without a process group: its facts, its tensors one by one, and how two differ.

Everything is read by `reading.py` and `stored.py`, so a file from elsewhere cannot run code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import read_digests
from tide_megatron.base.units import in_bytes
from tide_megatron.checkpoint.metadata import read_metadata
from tide_megatron.checkpoint.retention import chosen
from tide_megatron.checkpoint.stored import StoredTensors


def facts_of(path: Path) -> dict[str, str]:
    """Return what a checkpoint is in plain words, one fact a line.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    found = chosen(path)
    metadata, stored = read_metadata(found), StoredTensors(found)
    try:
        sizes = [size for size, _ in read_digests(found).values()]
    except ValueError as fault:
        raise CheckpointError(f"{found}: {fault}; see tide checkpoint verify") from None
    clock = metadata.clock
    weights = [name for name in stored.entries if not name.startswith("optimizer.")]
    numbers = sum(stored.entries[name].size.numel() for name in weights)
    return {
        "checkpoint": str(found),
        "step": f"{clock.step} of {clock.total_steps}, {clock.skipped} skipped",
        "samples": str(clock.consumed),
        "optimizer steps": ", ".join(map(str, metadata.optimizer_steps)),
        "recipe": metadata.recipe_digest,
        "data": metadata.data,
        "written by": f"megatron-core {metadata.megatron_core} on {metadata.ranks} ranks",
        "size": f"{in_bytes(sum(sizes))} in {len(sizes)} files",
        "tensors": f"{len(weights)} of the model ({numbers:,} parameters), {len(stored.entries)} in all",
        **({"spent": _spent(metadata.spent)} if metadata.spent else {}),
        **{f"metrics {name}": f"{value:.6g}" for name, value in metadata.metrics.items()},
    }


def _spent(spent: dict[str, float]) -> str:
    seconds, cpu_seconds, starts = (spent.get(name, 0.0) for name in ("seconds", "cpu_seconds", "starts"))
    return f"{seconds:.0f} s, {cpu_seconds:.0f} s of processors, {starts:.0f} start(s)"


def values_of(path: Path, *, tensors: bool) -> dict[str, Any]:
    """Return what a checkpoint is as plain values: state.json's, its size and, if asked for, its tensors.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    found = chosen(path)
    values = {"checkpoint": str(found), **dataclasses.asdict(read_metadata(found))}
    try:
        values["files"] = {name: size for name, (size, _) in read_digests(found).items()}
    except ValueError as fault:
        raise CheckpointError(f"{found}: {fault}; see tide checkpoint verify") from None
    if tensors:
        stored = StoredTensors(found)
        values["tensors"] = {
            name: {"shape": list(stored.shape(name)), "dtype": str(stored.dtype(name)).removeprefix("torch.")}
            for name in stored.entries
        }
    return values


def tensors_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, shape and dtype of every tensor."""
    stored = StoredTensors(chosen(path))
    for name in stored.entries:
        shape = " x ".join(map(str, stored.shape(name))) or "scalar"
        yield name, shape, str(stored.dtype(name)).removeprefix("torch.")


def metadata_differences(one: Path, other: Path) -> Iterator[str]:
    """Yield `key: first -> second` for whatever differs in what two checkpoints say of themselves."""
    left, right = (_flat(dataclasses.asdict(read_metadata(path))) for path in (one, other))
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            yield f"{key}: {left.get(key)} -> {right.get(key)}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """What is not the same about a tensor."""

    name: str
    words: str
    """Set where values cannot be compared: one side lacks it, or shapes differ."""
    absolute: float = 0.0
    """Largest difference of two elements; NaN against a number is infinite."""
    relative: float = 0.0
    """Largest difference over the larger of the two elements' sizes."""


def tensor_differences(left: Path, right: Path) -> Iterator[TensorDifference]:
    """Yield the tensors that differ between two checkpoints, by name; two are in memory at a time.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    one, other = StoredTensors(left), StoredTensors(right)
    for name in sorted({*one.entries, *other.entries}):
        words = _incomparable(one, other, name)
        if words:
            yield TensorDifference(name=name, words=words)
            continue
        a, b = one.read(name), other.read(name)
        if torch.equal(a, b):
            continue
        if a.dtype != b.dtype or not a.is_floating_point():
            a, b = a.double(), b.double()
        a, b = a.float() if a.itemsize < 4 else a, b.float() if b.itemsize < 4 else b
        is_same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(
            is_same, torch.zeros_like(a), (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        )
        absolute = float(gap.max())
        if absolute:
            size = torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(a.dtype).tiny)
            relative = torch.where(gap > 0, gap / size, gap).nan_to_num(nan=torch.inf)
            yield TensorDifference(name=name, words="", absolute=absolute, relative=float(relative.max()))


def difference_values(one: Path, other: Path) -> dict[str, Any]:
    """Return how two checkpoints differ as plain values; what is not finite as text, for JSON has none.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    tensors = [
        {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(found).items()
        }
        for found in tensor_differences(one, other)
    ]
    return {"metadata": list(metadata_differences(one, other)), "tensors": tensors}


def _incomparable(one: StoredTensors, other: StoredTensors, name: str) -> str:
    """Say why a tensor's values cannot be compared; empty where they can."""
    for stored, side in ((one, "first"), (other, "second")):
        if name not in stored.entries:
            return f"not in the {side}"
    if one.shape(name) != other.shape(name):
        return f"shapes {one.shape(name)} and {other.shape(name)}"
    return ""
