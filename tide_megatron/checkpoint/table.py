"""A checkpoint's table of contents (`.metadata`), and its tensors one by one; no process group needed.

torch writes the table by pickle. It is read here with nothing but the classes that belong into one, so a
file from elsewhere cannot run code; values are read as `torch.load(weights_only=True)` does.
megatron-core's own `load` wants every part of a tensor to be held by some rank at once; torch's reader
underneath gives any part.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
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
from tide_megatron.checkpoint.names import METADATA

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


class Table:
    """What tensors a checkpoint has."""

    def __init__(self, found: Path) -> None:
        """Read the table of a checkpoint.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.found = found
        try:
            with (found / METADATA).open("rb") as stream:
                metadata = _Unpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
            self.tensors: dict[str, TensorStorageMetadata] = {
                name: entry
                for name, entry in sorted(metadata.state_dict_metadata.items())
                if isinstance(entry, TensorStorageMetadata)
            }
        except _UNREADABLE as fault:
            raise CheckpointError(
                f"{found / METADATA}: cannot be read ({fault}); choose another checkpoint"
            ) from None
        self._reader = FileSystemReader(found)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self.tensors[name].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return tuple(self.tensors[name].size)

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
        box = ChunkStorageMetadata(
            offsets=torch.Size(offsets or [0] * len(shape)), sizes=torch.Size(sizes or shape)
        )
        target = torch.empty(box.sizes, dtype=self.dtype(name))
        try:
            items = create_read_items_for_chunk_list(name, self.tensors[name], [box])
            if sum(item.lengths.numel() for item in items) != target.numel():
                raise ValueError("parts of it are in no file")
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, KeyError, AssertionError, *_UNREADABLE) as fault:
            raise CheckpointError(
                f"{self.found}: {name} cannot be read ({_first_line(fault)}); see tide checkpoint verify"
            ) from None
        return target


def _first_line(fault: BaseException) -> str:
    return str(fault).partition("\n")[0]
