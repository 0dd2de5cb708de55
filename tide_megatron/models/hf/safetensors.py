"""Files of safetensors: read lazily, by rows or columns; written tensor by tensor, only that one in memory.

A file's header holds the place of every tensor, so names, shapes and dtypes are planned first; then each
tensor is written where it belongs, in whatever order they come. Within a file wide dtypes stand first, which
keeps every tensor aligned to its own width, as readers that map the file want it. What is larger than one
file may be goes into several, with the index that Hugging Face's readers look for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.hf.ahead import Span
from tide_megatron.models.shard import Part, Shape

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest file, unless one tensor alone is larger."""

MAPPED_BYTES = 2**28
"""About so much of a file stays mapped: pages count as this process's memory until they are let go."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's word -> dtype."""
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class TensorFile:
    """One safetensors file: opened, and opened anew now and then, so that not all of it stays in memory."""

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path, self._mapped = path, 0
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
            raise _damaged(self.path / name, fault) from None
        # Columns lie in every page of their tensor.
        touched = tensor.numel() if part is None or not part.axis else math.prod(self.shapes[name])
        self._mapped += touched * tensor.element_size()
        return tensor

    def spans(self, name: str, part: Part | None) -> list[Span]:
        """Return the bytes of the file that `read` will touch; columns lie in all rows of their tensor."""
        begin, end = self._places[name]
        if part is None:
            return [Span(self.path, begin, end)]
        shape = self.shapes[name]
        if part.number is not None:
            size = (end - begin) // shape[0]
            begin, end = begin + part.number * size, begin + (part.number + 1) * size
            shape = shape[1:]
        if part.axis:
            return [Span(self.path, begin, end)]
        row = (end - begin) // shape[0]
        return [
            Span(self.path, begin + row * start, begin + row * stop)
            for start, stop in part.ranges
            if start < stop
        ]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Of every tensor: its first byte in the file, and the one behind its last."""
        try:
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except OSError as fault:
            raise _damaged(self.path, fault) from None
        places = {name: header[name]["data_offsets"] for name in self.shapes}
        return {name: (8 + size + begin, 8 + size + end) for name, (begin, end) in places.items()}

    def _opened(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as fault:
            raise _damaged(self.path, fault) from None


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


Plan = Mapping[str, TensorSpec]
"""Name -> what will be written under it."""


def planned_bytes(plan: Plan) -> int:
    """Return the bytes of all tensors of a plan."""
    return sum(tensor.num_bytes for tensor in plan.values())


def split_plan(plan: Plan, shard_bytes: int = SHARD_BYTES) -> dict[str, dict[str, TensorSpec]]:
    """Cut a plan into files as transformers does: in the plan's order, each file as full as it may be.

    Args:
        plan: what will be written; at least one tensor.
        shard_bytes: largest file; a larger tensor has one of its own.

    Returns:
        File name -> the plan of that file.
    """
    assert plan, "a model has weights"
    split = split_state_dict_into_shards_factory(
        dict(plan),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern=WEIGHTS_FILE.replace(".", "{suffix}."),
        max_shard_size=shard_bytes,
    )
    return {file: {name: plan[name] for name in names} for file, names in split.filename_to_tensors.items()}


def write_index(folder: Path, files: Mapping[str, Plan]) -> None:
    """Write the index of several files into a folder: which tensor is where.

    Args:
        folder: where the files stand or will stand.
        files: file name -> what it holds.
    """
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = {
        "metadata": {"total_size": sum(planned_bytes(tensors) for tensors in files.values())},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """Writes a plan's tensors into a folder; a context manager, because it holds files open."""

    def __init__(self, folder: Path, plan: Plan, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the headers of all files, and the index where there are several.

        Args:
            folder: an existing folder.
            plan: what will be written.
            shard_bytes: largest file.

        Raises:
            OSError: the disk refuses.
        """
        self._left = dict(plan)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._open = contextlib.ExitStack()
        files = split_plan(plan, shard_bytes)
        with contextlib.ExitStack() as opened:
            for file, tensors in files.items():
                handle = opened.enter_context((folder / file).open("wb"))
                start = handle.write(file_header(tensors))
                for name, (begin, _) in _offsets(tensors).items():
                    self._places[name] = (handle, start + begin)
            self._open = opened.pop_all()
        if len(files) > 1:
            write_index(folder, files)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        assert kind is not None or not self._left, f"never written: {sorted(self._left)}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, once.

        Args:
            name: of the plan.
            tensor: as planned, on any device.

        Raises:
            OSError: the disk refuses.
        """
        wanted = self._left.pop(name)
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        assert found == wanted, f"{name} is {found}, planned was {wanted}"
        handle, place = self._places[name]
        handle.seek(place)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        handle.write(flat.view(torch.uint8).numpy().data)


def write_tensors(
    folder: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as they come into a folder; see `ShardWriter`."""
    with ShardWriter(folder, plan, shard_bytes) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


def _offsets(tensors: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Place a file's tensors behind each other, wide dtypes first; [begin, end) behind the header."""
    places, begin = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize):
        places[name] = (begin, begin + tensor.num_bytes)
        begin += tensor.num_bytes
    return places


def file_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """Return what stands before the tensors: the length of the description, and the description."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, offsets in _offsets(tensors).items():
        planned = tensors[name]
        header[name] = {
            "dtype": _WORDS[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": list(offsets),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _damaged(path: Path, fault: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated ({fault}); copy or download it again")
