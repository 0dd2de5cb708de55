"""Read parts of the tensors of a `torch_dist` checkpoint, without collectives and without foreign pickles.

megatron-core's own `load` wants every part of a tensor to be held by some rank at once; a converter wants a
few at a time. torch's distributed checkpoint underneath can do that. Its index (`.metadata`) is a pickle, in
which we admit torch's own descriptions of tensors and files and nothing else; tensors themselves are read
with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tide_megatron.base.errors import CheckpointError

INDEX = ".metadata"
_UNREADABLE = (pickle.UnpicklingError, AttributeError, AssertionError)
_ADMITTED = ("torch.distributed.checkpoint.", "torch.distributed._shard.metadata")
_ADMITTED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class MegatronReader:
    """An open checkpoint: what is in it, and parts of it."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Args:
            folder: of the torch_dist files.

        Raises:
            CheckpointError: there is no index, or it is damaged, or holds more than descriptions.
        """
        self._folder = folder
        try:
            with (folder / INDEX).open("rb") as file:
                metadata = _Unpickler(file).load()
            assert isinstance(metadata, Metadata), f"a {type(metadata).__name__}"
        except (
            OSError,
            AssertionError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ValueError,
        ) as fault:
            raise CheckpointError(
                f"{folder / INDEX}: not readable as the index of a torch_dist checkpoint ({fault})"
            ) from None
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> whole shape of every tensor."""
        return {key: tuple(value.size) for key, value in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._tensors[key].properties.dtype

    def read(self, part: ShardedTensor) -> Tensor:
        """Return a part of a tensor, [*part.local_shape], on CPU.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        stacked = (1,) * part.prepend_axis_num
        sizes = torch.Size([*stacked, *part.local_shape])
        chunk = ChunkStorageMetadata(offsets=torch.Size(part.global_offset), sizes=sizes)
        items = create_read_items_for_chunk_list(part.key, self._tensors[part.key], [chunk])
        target = torch.empty(sizes, dtype=self.dtype(part.key))
        assert sum(item.lengths.numel() for item in items) == target.numel(), f"{part.key} has holes"
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, EOFError, RuntimeError, *_UNREADABLE) as fault:
            raise CheckpointError(
                f"{self._folder}: {part.key} cannot be read ({fault}); a file is damaged, copy it again"
            ) from fault
        return target.view(part.local_shape)


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


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors and files, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an admitted class."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ADMITTED_NAMES:
            return super().find_class(module, name)
        if module.startswith(_ADMITTED):
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no description of a tensor")
