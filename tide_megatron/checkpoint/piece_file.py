"""Pieces on disk: one file a rank, and how they enter the checkpoint's table of contents.

The format is torch's own (`torch.distributed.checkpoint`): boxes as `torch.save` writes them, one behind the
other, and `.metadata` says which file has which box from which byte on. Left out: reading; torch does it.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tide_megatron.base.digests import DigestingFile
from tide_megatron.checkpoint.names import METADATA
from tide_megatron.checkpoint.pieces import Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a piece was written."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    position: int
    """First byte in the file."""
    length: int
    """Bytes."""


def write_pieces(path: Path, pieces: Iterable[Piece]) -> tuple[list[Entry], tuple[int, str]]:
    """Write pieces into one file and flush it to the disk.

    Returns:
        Where each piece lies, and the file's (bytes, SHA-256).

    Raises:
        OSError: the disk refuses.
    """
    entries = []
    with path.open("wb", buffering=0) as stream:
        file = DigestingFile(stream)
        for piece in pieces:
            position, values = file.position, _alone(piece.values)
            torch.save(values.view(piece.sizes), file)  # type: ignore[arg-type]  # it only writes
            entries.append(
                Entry(
                    name=piece.name,
                    shape=piece.shape,
                    offsets=piece.offsets,
                    sizes=piece.sizes,
                    dtype=values.dtype,
                    file=path.name,
                    position=position,
                    length=file.position - position,
                )
            )
        os.fsync(stream.fileno())
    return entries, file.facts()


def _alone(values: Tensor) -> Tensor:
    """Return values as a CPU tensor with a storage of their own, since `torch.save` writes whole storages."""
    if values.device.type == "cpu" and values.dtype is torch.float32:
        return torch.from_numpy(values.numpy())  # the same memory: nothing is copied
    return values.cpu().clone()


def enter_pieces(folder: Path, entries: Iterable[Entry]) -> None:
    """Add pieces to the table of contents that megatron-core has written."""
    metadata = FileSystemReader(folder).read_metadata()
    for entry in entries:
        tensor = metadata.state_dict_metadata.setdefault(
            entry.name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=entry.dtype), size=torch.Size(entry.shape), chunks=[]
            ),
        )
        assert isinstance(tensor, TensorStorageMetadata), f"{entry.name} is no tensor in {folder}"
        tensor.chunks.append(
            ChunkStorageMetadata(offsets=torch.Size(entry.offsets), sizes=torch.Size(entry.sizes))
        )
        metadata.storage_data[MetadataIndex(entry.name, entry.offsets)] = _StorageInfo(
            relative_path=entry.file, offset=entry.position, length=entry.length
        )
    with (folder / METADATA).open("wb") as stream:
        pickle.dump(metadata, stream)
