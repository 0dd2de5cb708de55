"""A Hugging Face model folder on disk: read lazily and checked, or written whole.

Reading takes `model.safetensors`, or the shards that `model.safetensors.index.json` names. Headers are read
at once, bytes only when asked for, and counted. A truncated or damaged file, a missing shard, a folder with
pickled weights only: each is one `CheckpointError` that names the file. Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import replaced_folder
from tide_megatron.models.hf.config import HfConfig, read_json, write_config
from tide_megatron.models.hf.safetensors import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    Plan,
    TensorFile,
    write_tensors,
)
from tide_megatron.models.shard import Part, Shape

WEIGHTS = (".safetensors", ".distcp")
"""Files whose digests are recorded; the others are text, which people may edit."""


class HfFolder:
    """Lazy access to the tensors of a folder; a context manager, because it holds files open."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all weight files.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensors read so far, as stored."""
        self.shapes: dict[str, Shape] = {}
        """Shape of every tensor in the folder."""
        self._open = contextlib.ExitStack()
        self._files: dict[str, TensorFile] = {}
        try:
            for path in _weight_files(folder):
                file = TensorFile(path)
                self._open.callback(file.close)
                self.shapes.update(file.shapes)
                self._files.update(dict.fromkeys(file.shapes, file))
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """Return one tensor as stored, on CPU: the whole, or only the rows or columns of a part.

        The zero rows of a part are made here, not read.
        """
        tensor = self._files[name].read(name, part)
        made = 0 if part is None else part.zero_rows * math.prod(tensor.shape[1:])
        self.bytes_read += (tensor.numel() - made) * tensor.element_size()
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that one tensor is stored in; nothing is read.

        Raises:
            CheckpointError: one that no reader here knows.
        """
        word = self._files[name].dtype(name)
        if word not in DTYPES:
            raise CheckpointError(
                f"{self.folder / name}: stored as {word}; only {', '.join(DTYPES)} are read"
            )
        return DTYPES[word]


def check_weights(folder: Path) -> None:
    """Read the headers of a folder's weights.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    with HfFolder(folder):
        pass


def stream_folder(
    folder: Path,
    config: HfConfig,
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    files: Iterable[Path] = (),
) -> None:
    """Write a model folder, its weights as they come.

    Args:
        folder: where it shall stand; an older folder of that name is replaced as a whole.
        config: what config.json says.
        plan: the weights by Hugging Face name.
        tensors: (name, tensor), each of the plan's once, in any order, on any device.
        files: further files to copy into it (tokenizer.json...).

    Raises:
        CheckpointError: when the disk refuses; nothing half-written stays.
    """
    with replaced_folder(folder, WEIGHTS) as partial:
        write_config(partial, config)
        write_tensors(partial, plan, tensors)
        for file in files:
            shutil.copyfile(file, partial / file.name)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, all of them present."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such model folder; give a local folder with {WEIGHTS_FILE} in it"
        )
    if not (folder / INDEX_FILE).exists():
        if (folder / WEIGHTS_FILE).exists():
            return [folder / WEIGHTS_FILE]
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = (
            "its pickled weights are not read, save it as safetensors" if pickled else "download it whole"
        )
        raise CheckpointError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; {remedy}")
    index = read_json(folder / INDEX_FILE, "it names the weight files")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(
            f"{folder / INDEX_FILE}: has no weight_map of tensor to file; download it again"
        )
    files = [folder / name for name in sorted(set(places.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(missing)}; download it whole"
        )
    return files
