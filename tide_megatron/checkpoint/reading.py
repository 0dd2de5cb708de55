"""Read what a checkpoint pickles without running it: the table of contents, common values, byte entries.

torch writes the table of contents (`.metadata`) by pickle, and megatron-core pickles plain values
(`common.pt`, byte entries of `*.distcp`). A pickle may name any function to call, and their own readers call
it. Here a table may name nothing but the classes that belong into one, each by its name, and values are read
as `torch.load(weights_only=True)` reads them. A checkpoint from elsewhere can therefore be wrong, but runs
nothing: on a resume, a conversion, an inspection or a comparison alike, which all come through this file.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.read import json_of
from tide_megatron.checkpoint.writer import COMMON, FORMAT, TABLE

_CHECKPOINT, _SHARD = "torch.distributed.checkpoint", "torch.distributed._shard"
_CLASSES = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_SHARD}.metadata": {"ShardMetadata"},
    f"{_SHARD}.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "ShardedTensorMetadata", "TensorProperties"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
"""Module -> what a table may name of it. A module's other names are none of a table's: it imports more."""
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    RecursionError,
    MemoryError,
    OverflowError,
    pickle.UnpicklingError,
)
"""What a broken file makes of its reader."""


class _Unpickler(pickle.Unpickler):
    """Knows what belongs into a table of contents only."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(value, torch.dtype) or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_table(folder: Path) -> Metadata:
    """Read a checkpoint's table of contents.

    Raises:
        CheckpointError: it cannot be read, names something that belongs into no table, or names files outside
            of the checkpoint.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: is no file; put the right one back, or choose another checkpoint")
    try:
        with (folder / TABLE).open("rb") as stream:
            table = _Unpickler(stream).load()
        if not isinstance(table, Metadata):
            raise TypeError(f"it holds a {type(table).__name__}")
        for place in (table.storage_data or {}).values():
            if not place.relative_path or Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it names {place.relative_path!r}, which is no file of the checkpoint")
    except UNREADABLE as fault:
        raise CheckpointError(
            f"{folder / TABLE}: cannot be read ({fault}); choose another checkpoint"
        ) from None
    return table


def read_values(source: Path | IO[bytes], map_location: Any = "cpu") -> Any:
    """Read pickled values: tensors, numbers, text and containers of them.

    Args:
        source: file or stream.
        map_location: where tensors go.

    Raises:
        pickle.UnpicklingError: it names something else; the message says what.
    """
    try:
        return _torch_load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as fault:
        told = str(fault)  # pages of advice, part of it how to let everything through
        named = re.search(r"GLOBAL (\S+)", told)
        words = (
            f"{named[1]} does not belong there" if named else told.partition("WeightsUnpickler error: ")[2]
        )
        raise pickle.UnpicklingError(words.partition("\n")[0] or "it is no pickle of values") from None


_torch_load = torch.load


@contextlib.contextmanager
def restricted(folder: Path) -> Iterator[None]:
    """Let the libraries read one checkpoint while the block runs, by these readers instead of their own.

    What can be refused beforehand is refused before the block; byte entries are met inside it.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: its format, table or common values are not what may be read.
    """
    _check_format(folder / FORMAT)
    table, common = read_table(folder), folder / COMMON
    if common.is_file():  # megatron-core 0.19 keeps these values in a byte entry
        try:
            read_values(common)
        except (RuntimeError, *UNREADABLE) as fault:
            told = str(fault).partition("\n")[0]
            raise CheckpointError(f"{common}: cannot be read ({told}); choose another checkpoint") from None

    def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        if Path(reader.path) != folder:
            raise pickle.UnpicklingError(f"{reader.path} is another checkpoint than {folder}")
        table.storage_meta = table.storage_meta or StorageMeta()
        table.storage_meta.load_id = reader.load_id
        return table

    def load(source: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return read_values(source, map_location)

    library: Any = torch  # as values of any type, for both are given other signatures
    reader_class: Any = FileSystemReader
    kept = library.load, reader_class.read_metadata
    library.load, reader_class.read_metadata = load, read_metadata
    try:
        yield
    finally:
        library.load, reader_class.read_metadata = kept


def _check_format(file: Path) -> None:
    """Refuse a format that another library would be asked to read."""
    try:
        said = json_of(file)
        formats = said.get("sharded_backend"), said.get("common_backend") or "torch"
    except UNREADABLE as fault:
        raise CheckpointError(f"{file}: cannot be read ({fault}); choose another checkpoint") from None
    if formats != ("torch_dist", "torch"):
        raise CheckpointError(
            f"{file}: format {' with '.join(map(str, formats))} is not read, only torch_dist is; "
            "choose another checkpoint"
        )
