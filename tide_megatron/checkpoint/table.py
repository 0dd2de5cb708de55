"""A checkpoint's table of contents (`.metadata`), and its tensors one by one; no process group needed.

torch writes the table by pickle. It is read here with nothing but the classes that belong into one, so a
file from elsewhere cannot run code; values are read as `torch.load(weights_only=True)` does.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.names import METADATA

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
    "megatron.core.dist_checkpointing.strategies.torch",
)
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class _Reader(pickle.Unpickler):
    """Knows the classes of a table of contents only."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        is_known = module in _MODULES or (module, name) in _NAMES or isinstance(value, torch.dtype)
        if not is_known or "." in name:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


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
                metadata: Metadata = _Reader(stream).load()
            self._storage = dict(metadata.storage_data)
            self.tensors: dict[str, TensorStorageMetadata] = {
                name: entry
                for name, entry in sorted(metadata.state_dict_metadata.items())
                if isinstance(entry, TensorStorageMetadata)
            }
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as fault:
            raise CheckpointError(
                f"{found / METADATA}: cannot be read ({fault}); choose another checkpoint"
            ) from None

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self.tensors[name].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return tuple(self.tensors[name].size)

    def read(self, name: str) -> Tensor:
        """Read one whole tensor.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            for chunk in self.tensors[name].chunks:
                place = self._storage[MetadataIndex(name, chunk.offsets)]
                with (self.found / place.relative_path).open("rb") as stream:
                    stream.seek(place.offset)
                    part = torch.load(
                        io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True
                    )
                ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
                whole[tuple(map(slice, chunk.offsets, ends))] = part.view(tuple(chunk.sizes))
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as fault:
            raise CheckpointError(
                f"{self.found}: {name} cannot be read ({_first_line(fault)}); see tide checkpoint verify"
            ) from None
        return whole


def _first_line(fault: BaseException) -> str:
    return str(fault).partition("\n")[0]
