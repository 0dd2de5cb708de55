"""What a rank writes of a checkpoint: shards of tensors, in chunks as torch's planner knows them.

megatron-core writes the fully reshardable format by gathering masters and moments of all parameters on every
rank, several times over, while training waits (30 GB for 0.6B parameters). The same entries of the same names
can be written by each rank from its own shard, since a checkpoint's tensor may be cut into any chunks;
reading is megatron-core's own, on any layout.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one number an axis."""


def chunks_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Chunk]:
    """Cut the elements start..stop of a row-major array into chunks, in order.

    A distributed optimizer cuts the flat buffer of all parameters evenly over ranks, wherever the cuts fall;
    a checkpoint knows only chunks. A range of a matrix is at most three: the end of a row, whole rows, the
    start of a row.

    Args:
        shape: of the array.
        start: first element, counted flat.
        stop: one behind the last element.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows first..last
    if first > last:  # all within one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within(shape, last, 0, stop - last * row)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Chunk]:
    """Cut a range inside one row."""
    for offsets, sizes in chunks_of(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalShard:
    """A chunk of a checkpoint's tensor, which this rank owns."""

    name: str
    """Of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    source: Tensor
    """Flat live tensor that holds the chunk's elements in order."""
    start: int = 0
    """First of them."""

    @classmethod
    def of(cls, entry: ShardedTensor, values: Tensor) -> LocalShard:
        """Return all of megatron-core's entry over its values, which must be contiguous."""
        assert values.is_contiguous(), f"{entry.key} is not contiguous"
        return cls(
            name=entry.key,
            shape=tuple(entry.global_shape),
            offsets=tuple(entry.global_offset),
            sizes=(*(1 for _ in range(entry.prepend_axis_num)), *entry.local_shape),
            source=values.detach().view(-1),
        )

    @property
    def values(self) -> Tensor:
        """The chunk's elements as they are now."""
        return self.source[self.start : self.start + math.prod(self.sizes)].view(self.sizes)

    @property
    def item(self) -> WriteItem:
        """What torch's writer wants to know of it."""
        return WriteItem(
            index=MetadataIndex(self.name, self.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=torch.Size(self.sizes)),
                properties=TensorProperties(dtype=self.source.dtype),
                size=torch.Size(self.shape),
            ),
        )


class ShardPlanner(DefaultSavePlanner):
    """Tells torch's writer what this rank writes, and hands it over."""

    def __init__(self, shards: Sequence[LocalShard], objects: Mapping[str, Any]) -> None:
        """Take what to write.

        Args:
            shards: this rank's.
            objects: values that are no tensors, by the names that megatron-core gives them.
        """
        super().__init__(flatten_state_dict=False)
        self._shards = {(shard.name, shard.offsets): shard for shard in shards}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        """Return the plan of this rank."""
        items = [shard.item for shard in self._shards.values()]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the values of an item of the plan."""
        index = write_item.index
        if write_item.type is not WriteItemType.BYTE_IO:
            assert index.offset is not None, f"{index.fqn} is a shard"
            return self._shards[index.fqn, tuple(index.offset)].values
        stream = io.BytesIO()
        torch.save([self._objects[index.fqn]], stream)  # a list of one, as megatron-core's reader wants it
        return stream


class Staging:
    """Room for a copy of the shards, kept from save to save: fresh memory costs as much as the copy.

    On CUDA the room is pinned, so that copies run at the bus's speed.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._room: dict[int, Tensor] = {}

    def copy(self, shards: Sequence[LocalShard]) -> list[LocalShard]:
        """Return the shards over copies of what they hold now; the copies hold until the next call."""
        sources = {id(shard.source): shard.source for shard in shards}
        copies = {}
        for place, (key, source) in enumerate(sources.items()):
            room = self._room.get(place)
            if room is None or room.shape != source.shape or room.dtype != source.dtype:
                pinned = source.device.type == "cuda"
                room = self._room[place] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            copies[key] = room.copy_(source, non_blocking=True)
        if any(source.device.type == "cuda" for source in sources.values()):
            torch.cuda.synchronize()
        return [dataclasses.replace(shard, source=copies[id(shard.source)]) for shard in shards]
