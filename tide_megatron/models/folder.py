"""A Hugging Face model folder on disk, read lazily and checked (`writing.py` writes one).

Reading takes `model.safetensors`, or the shards that `model.safetensors.index.json` names. Headers are read
at once, bytes only when asked for, and counted. A truncated or damaged file, a missing shard, a folder with
pickled weights only: each is one `CheckpointError` that names the file. Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.shard import Part, Shape
from tide_megatron.models.shards import DTYPES, INDEX_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.json"
MAPPED_BYTES = 2**28
"""Of a file that stay mapped, about: pages once read count as this process's memory until they are let go."""


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
        self._files: dict[str, _WeightFile] = {}
        try:
            for path in _weight_files(folder):
                file = _WeightFile(path)
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


class _WeightFile:
    """One safetensors file: opened, and opened anew now and then, so that not all of it stays in memory."""

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self._path, self._mapped = path, 0
        self._file = self._opened()
        try:
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        except SafetensorError as fault:
            self.close()
            raise _damaged(path, fault) from None

    def close(self) -> None:
        """Let go of the file."""
        self._file.__exit__(None, None, None)

    def dtype(self, name: str) -> str:
        """Return the format's word for a tensor's dtype."""
        word: str = self._file.get_slice(name).get_dtype()
        return word

    def read(self, name: str, part: Part | None) -> Tensor:
        """Return a tensor, or a part of it, in memory of its own."""
        try:
            if self._mapped > MAPPED_BYTES:
                self.close()
                self._file, self._mapped = self._opened(), 0
            if part is None:
                tensor: Tensor = self._file.get_tensor(name)
            else:
                tensor = part.take(self._file.get_slice(name))
        except (SafetensorError, OSError) as fault:
            raise _damaged(self._path / name, fault) from None
        # Columns lie in every page of their tensor.
        touched = tensor.numel() if part is None or not part.axis else math.prod(self.shapes[name])
        self._mapped += touched * tensor.element_size()
        return tensor

    def _opened(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as fault:
            raise _damaged(self._path, fault) from None


def check_weights(folder: Path) -> None:
    """Read the headers of a folder's weights.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    with HfFolder(folder):
        pass


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder.

    Raises:
        CheckpointError: when it is missing or not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; give a local folder with {CONFIG_FILE} in it")
    return _read_json(path, "a Hugging Face model folder needs it")


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
    index = _read_json(folder / INDEX_FILE, "it names the weight files")
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


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {purpose}") from None
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: not readable as JSON ({fault}); {purpose}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a JSON object; {purpose}")
    return value


def _damaged(path: Path, fault: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated ({fault}); copy or download it again")
