"""Look into a checkpoint without a process group: its facts, its tensors one by one, and how two differ.

torch writes the table of contents by pickle. It is read here with nothing but the classes that belong into
one, so a file from elsewhere cannot run code; values are read as `torch.load(weights_only=True)` does.
megatron-core's own `load` wants every part of a tensor to be held by some rank at once; torch's reader
underneath gives any part.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import read_digests
from tide_megatron.base.units import in_bytes
from tide_megatron.checkpoint.metadata import read_metadata
from tide_megatron.checkpoint.retention import chosen
from tide_megatron.checkpoint.writer import TABLE

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.metadata",
    "megatron.core.dist_checkpointing.strategies.torch",
)
"""Whose classes a table may hold."""
_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a table of contents only."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype) or (module, name) in _NAMES:
            return super().find_class(module, name)
        if module in _MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_table(folder: Path) -> Metadata:
    """Read a checkpoint's table of contents.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with (folder / TABLE).open("rb") as stream:
            table = _Unpickler(stream).load()
        if not isinstance(table, Metadata):
            raise TypeError(f"it holds a {type(table).__name__}")
    except _UNREADABLE as fault:
        raise CheckpointError(
            f"{folder / TABLE}: cannot be read ({fault}); choose another checkpoint"
        ) from None
    return table


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return where an item goes."""
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do."""


class StoredTensors:
    """The tensors of a checkpoint on disk."""

    def __init__(self, found: Path) -> None:
        """Read the table of a checkpoint.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.found = found
        table = read_table(found)
        self.entries: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in sorted(table.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
        }
        self._reader = FileSystemReader(found)
        self._reader.set_up_storage_reader(table, is_coordinator=True)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self.entries[name].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return tuple(self.entries[name].size)

    def read(self, name: str, offsets: Sequence[int] = (), sizes: Sequence[int] = ()) -> Tensor:
        """Read a tensor, or a part of it, onto the CPU.

        Args:
            name: of the tensor.
            offsets: where the part begins, on every axis; without it the whole is read.
            sizes: how far it goes.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        shape = self.shape(name)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size(offsets or [0] * len(shape)), sizes=torch.Size(sizes or shape)
        )
        target = torch.empty(chunk.sizes, dtype=self.dtype(name))
        try:
            items = create_read_items_for_chunk_list(name, self.entries[name], [chunk])
            if sum(item.lengths.numel() for item in items) != target.numel():
                raise ValueError("parts of it are in no file")
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, KeyError, AssertionError, *_UNREADABLE) as fault:
            told = str(fault).partition("\n")[0]
            raise CheckpointError(
                f"{self.found}: {name} cannot be read ({told}); see tide checkpoint verify"
            ) from None
        return target


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
