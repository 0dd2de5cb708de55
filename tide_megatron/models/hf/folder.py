"""A Hugging Face model folder on disk: read lazily and checked, or written whole.

Reading takes `model.safetensors`, or else the shards that `model.safetensors.index.json` names, each tensor
from the shard that the index says. Headers are read at once, bytes only when asked for, and counted. A
truncated or damaged file, a missing shard, a folder with pickled weights only: each is one `CheckpointError`
that names the file. Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import CheckpointError, some_of
from tide_megatron.base.files import replaced_folder
from tide_megatron.models.hf.ahead import ReadAhead
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
        self.doubts: list[str] = []
        """What is odd about the folder and no fault, in sentences."""
        self._open = contextlib.ExitStack()
        self._ahead: ReadAhead | None = None
        try:
            paths, places, self.doubts = _find_weights(folder)
            opened: dict[str, TensorFile] = {}
            for path in paths:
                file = TensorFile(path)
                self._open.callback(file.close)
                opened[path.relative_to(folder).as_posix()] = file
            self._files, copies = _choose_files(folder, opened, places)
            self.doubts += copies
            self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read_ahead(self, reads: Sequence[tuple[str, Part | None]], share: tuple[int, int]) -> None:
        """Begin to bring into memory what `read` will be called for next, in this order.

        Args:
            reads: names and parts, all there will be; they are small, so the list is short.
            share: (this rank, ranks) of those of this node; see `hf.ahead`.

        Raises:
            CheckpointError: a file's header cannot be read.
        """
        assert self._ahead is None, "the folder is read once"
        spans = [self._files[name].spans(name, part) for name, part in reads]
        self._ahead = self._open.enter_context(ReadAhead(spans, share))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """Return one tensor as stored, on CPU: the whole, or only the rows or columns of a part.

        The zero rows of a part are made here, not read.

        Raises:
            CheckpointError: the file is damaged, or its disk fails.
        """
        if self._ahead is not None:
            try:
                self._ahead.await_next()
            except OSError as fault:
                raise CheckpointError(disk_words(fault)) from fault
        tensor = self.peek(name, part)
        made = 0 if part is None else part.zero_rows * math.prod(tensor.shape[1:])
        self.bytes_read += (tensor.numel() - made) * tensor.element_size()
        return tensor

    def peek(self, name: str, part: Part | None = None) -> Tensor:
        """Return what `read` does without counting it: a check is no loading."""
        return self._files[name].read(name, part)

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


def _find_weights(folder: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """Return the safetensors files of a folder, all present, what its index says, and what is odd about it.

    The order is transformers': a whole file goes before an index, so an index beside one is not read.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such model folder; give a local folder with {WEIGHTS_FILE} in it"
        )
    whole, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if whole.exists() and not whole.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{whole}: is no file; put the weights there")
    if whole.exists():
        odd = (
            f"{folder}: {WEIGHTS_FILE} is read, not the files that {INDEX_FILE} beside it names "
            "(transformers chooses the same); remove the one that is stale"
        )
        return [whole], {}, [odd] if index.exists() and not _names_only(index, WEIGHTS_FILE) else []
    if not index.exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = (
            "its pickled weights are not read, save it as safetensors" if pickled else "download it whole"
        )
        raise CheckpointError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; {remedy}")
    places = _read_index(index)
    files = [folder / name for name in sorted(set(places.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(missing)}; download it whole"
        )
    return files, places, []


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of every tensor, as an index says."""
    places = read_json(index, "it names the weight files").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor to file; download it again")
    for tensor, name in places.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{index}: {tensor}: {name!r} is not inside the folder; download the model again"
            )
    return places


def _names_only(index: Path, file: str) -> bool:
    """Say whether an index names no other file."""
    try:
        return {*_read_index(index).values()} == {file}
    except CheckpointError:
        return False


def _choose_files(
    folder: Path, files: Mapping[str, TensorFile], places: Mapping[str, str]
) -> tuple[dict[str, TensorFile], list[str]]:
    """Return the file that each tensor is read from, as the index says, and what is odd about it."""
    holders: dict[str, list[str]] = {}
    for file, opened in files.items():
        for name in opened.shapes:
            holders.setdefault(name, []).append(file)
    chosen, copies = {}, []
    for name, holding in holders.items():
        file = places.get(name, holding[0])
        if name not in places and len(holding) > 1:
            raise CheckpointError(
                f"{folder}: {name} is in {' and '.join(holding)}, and {INDEX_FILE} does not say which is "
                "meant; download the model again"
            )
        if len(holding) > 1:
            copies.append(
                f"{name} (from {file}, not {', '.join(other for other in holding if other != file)})"
            )
        chosen[name] = files[file]
    lost = [f"{name} in {file}" for name, file in places.items() if name not in files[file].shapes]
    if lost:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} names {some_of(lost)}, which is not there; download the model again"
        )
    if not copies:
        return chosen, []
    told = f"{folder}: several files hold the same tensor; {INDEX_FILE} decides: {some_of(copies)}"
    return chosen, [f"{told}; remove files that are stale"]
