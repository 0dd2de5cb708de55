"""The tensors of a checkpoint on disk, any part of any of them, without a process group.

megatron-core's own `load` wants every part of a tensor to be held by some rank at once, and of a distributed
optimizer every rank to hold the whole; torch's reader underneath gives any part. The table of contents is
read by `reading.py`, values as `torch.load(weights_only=True)` reads them, so that nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.planner import LocalShard
from tide_megatron.checkpoint.reading import UNREADABLE, read_table

_Places = dict[tuple[str, tuple[int, ...]], Tensor]
"""(tensor's name, offsets of the part) -> where the part goes."""


class _Into(DefaultLoadPlanner):
    """Reads parts of tensors to where they belong."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return where an item goes."""
        index = read_item.dest_index
        assert index.offset is not None, f"{index.fqn} is a part"
        place = self._places[index.fqn, tuple(index.offset)]
        return narrow_tensor_by_index(place, read_item.dest_offsets, read_item.lengths)

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
        target = torch.empty(torch.Size(sizes or shape), dtype=self.dtype(name))
        self._fill({(name, tuple(offsets or [0] * len(shape))): target})
        return target

    def read_into(self, shards: Iterable[LocalShard]) -> None:
        """Read shards to where they live, on any device; only files that hold parts of them are opened.

        Raises:
            CheckpointError: a tensor is not there, or of another shape; a file is missing or damaged. Some
                shards may have been read by then.
        """
        places: _Places = {}
        for shard in shards:
            if shard.name not in self.entries:
                raise CheckpointError(f"{self.found}: has no {shard.name}; it is of another model")
            there = self.shape(shard.name)
            if there != shard.shape:
                raise CheckpointError(
                    f"{self.found}: {shard.name} is {list(there)} there, {list(shard.shape)} in this model"
                )
            places[shard.name, shard.offsets] = shard.values
        self._fill(places)

    def _fill(self, places: _Places) -> None:
        """Read parts of tensors, file by file."""
        items: list[ReadItem] = []
        try:
            for (name, offsets), place in places.items():
                chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=place.shape)
                found = create_read_items_for_chunk_list(name, self.entries[name], [chunk])
                if sum(item.lengths.numel() for item in found) != place.numel():
                    raise ValueError(f"parts of {name} are in no file")
                items += found
            self._reader.read_data(LoadPlan(items), _Into(places)).wait()
        except (RuntimeError, AssertionError, *UNREADABLE) as fault:
            told, names = str(fault).partition("\n")[0], list(dict.fromkeys(name for name, _ in places))
            if "weights_only" in told:  # torch's advice is to let the file run what it names
                told = "what stands in its place is no tensor"
            what = names[0] if len(names) == 1 else f"{len(names)} tensors"
            raise CheckpointError(
                f"{self.found}: {what} cannot be read ({told}); see tide checkpoint verify"
            ) from None
