"""What both conversions share: where things stand, what is in them, and files that outlive a kill.

A Megatron checkpoint is found in Megatron-LM's folders, ours, or its own:

DST/latest_checkpointed_iteration.txt    `release`, or a number
DST/release/                             the torch_dist files (or iter_0000100/)
DST/hf/                                  config.json, tokenizer and what else came with the weights

It holds each tensor whole under a name of megatron-core's choosing (layers of one kind stacked, experts
stacked, a norm under the name of the layer behind it), whatever layout wrote it. We build the uncut model
without any memory (fake tensors) and take its `sharded_state_dict`: so other Megatron tools find what their
own models ask for, and no table of names of ours can go stale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from rich.progress import Progress
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tide_megatron.base.device import Device
from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import PARTIAL, commit_folder, discard, replaced_folder
from tide_megatron.base.lease import Lease, lease_beside, leased
from tide_megatron.base.read import text_of
from tide_megatron.checkpoint.retention import LATEST
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.build import TideModel
from tide_megatron.models.hf.config import CONFIG_FILE
from tide_megatron.models.hf.folder import WEIGHTS
from tide_megatron.models.mapping import HeadRows, ParamMapping
from tide_megatron.models.params import local_params
from tide_megatron.models.spec import ModelOptions
from tide_megatron.parallel.collectives import (
    broadcast_object,
    fail_together,
    held_by_first,
    is_first,
    own_share,
)
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout

TRACKER, RELEASE, HF = "latest_checkpointed_iteration.txt", "release", "hf"
_FORMAT = "metadata.json"
_NOT_COMPANIONS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)
_TOLD = "conversion.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedEntry:
    """One tensor of ours: the Hugging Face tensors it is made of, and its place in the checkpoint."""

    name: str
    """Our name, of the uncut model."""
    mapping: ParamMapping
    entry: ShardedTensor | ShardedTensorFactory
    """Without data."""

    def parts(self, tensor: Tensor) -> list[ShardedTensor]:
        """Return what of the checkpoint's tensors it is, over its data."""
        if isinstance(self.entry, ShardedTensor):
            return [dataclasses.replace(self.entry, data=tensor, dtype=tensor.dtype, replica_id=0)]
        return list(dataclasses.replace(self.entry, data=tensor, replica_id=0).build())

    def places(self, dtype: torch.dtype = torch.float32) -> list[ShardedTensor]:
        """Return the parts without values."""
        return self.parts(torch.empty(self.mapping.joined_shape, dtype=dtype, device="meta"))

    def merged(self, parts: list[Tensor]) -> Tensor:
        """Make our tensor of those parts."""
        merged: Tensor = parts[0] if isinstance(self.entry, ShardedTensor) else self.entry.merge_fn(parts)
        return merged


def sharded_entries(
    architecture: Architecture, device: Device, *, merged: bool = False
) -> tuple[list[ShardedEntry], dict[str, ShardedObject]]:
    """Ask megatron-core for the places of all weights. All ranks call it together (process groups).

    Args:
        architecture: of the whole model.
        device: where models of this process are built.
        merged: whether the Hugging Face tensors are those of `param_mappings(Architecture, merged=True)`.

    Returns:
        The tensors in the order of the weight table, and what megatron-core's layers write beside weights
        (nothing, as long as no FP8 engine runs).
    """
    layout = Layout()
    groups = make_groups(layout)
    with FakeTensorMode():
        model = TideModel(architecture, groups, ModelOptions(device=device, layout=layout))
        found: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        shard = model.shard
    entries = []
    for name, mapping in local_params(architecture, shard, merged=merged):
        entry = found.pop(name).without_data()
        if isinstance(mapping, HeadRows):  # our slice of a head is no layer of megatron-core
            entry = dataclasses.replace(entry, allow_shape_mismatch=True)
        entries.append(ShardedEntry(name=name, mapping=mapping, entry=entry))
    assert all(isinstance(value, ShardedObject) for value in found.values()), f"no weights: {list(found)}"
    return entries, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """A file of weights that is written in one go."""

    name: str
    entries: list[ShardedEntry]
    """What is read for it."""


def convert_files(
    source: Path,
    target: Path,
    files: Sequence[ConvertedFile],
    told: object,
    write: Callable[[ConvertedFile, Path, Callable[[], None]], None],
    finish: Callable[[Path, Path], None],
) -> dict[str, float]:
    """Write the files, shared out over ranks, and then the folder around them. All ranks call it together.

    Each file is written in a folder of its own, which takes the file's name when it is whole. These stay in
    `.TARGET.converting` beside the target, so a conversion that was cut off goes on with the file it was in.

    Args:
        source: what is read; it counts as the same while its files have their sizes and times.
        target: what is made.
        files: the same ones for any number of ranks.
        told: what will be written, in plain values; the same conversion is told in the same words.
        write: writes a file into an empty folder; calls its third argument after each entry.
        finish: completes the target; given the folder of the files, from which it moves them, and an empty
            folder that takes the target's place (first rank only).

    Returns:
        `files`, and `files_kept` of an earlier try.

    Raises:
        CheckpointError: the disk refuses.
    """
    with held_by_first(lambda: leased(lease_beside(target), str(target))) as lease:
        return _convert_files(source, target, files, told, write, finish, lease)


def _convert_files(
    source: Path,
    target: Path,
    files: Sequence[ConvertedFile],
    told: object,
    write: Callable[[ConvertedFile, Path, Callable[[], None]], None],
    finish: Callable[[Path, Path], None],
    lease: Lease | None,
) -> dict[str, float]:
    """Do so, holding the lease on the target (first rank)."""
    partial, kept = target.with_name(f".{target.name}.converting"), None
    with fail_together():
        if is_first():
            _begin(partial, told, source)
            kept = [file.name for file in files if (partial / file.name).is_dir()]
    kept = broadcast_object(kept)
    rank, ranks = own_share()
    own = [file for file in files if file.name not in kept][rank::ranks]
    with fail_together(), Progress(transient=True, disable=not is_first()) as bar:
        task = bar.add_task("converting", total=sum(len(file.entries) for file in own))
        for file in own:
            room = partial / f"{file.name}{PARTIAL}"
            with disk_faults(partial / file.name, remedy="; with the same command it goes on"):
                discard(room)
                room.mkdir()
                write(file, room, lambda: bar.advance(task))
                commit_folder(room, partial / file.name)
    with fail_together():
        if is_first():
            with replaced_folder(target, WEIGHTS) as final:
                finish(partial, final)
                assert lease is not None, "the first rank holds it"
                lease.check()
            shutil.rmtree(partial, ignore_errors=True)
    return {"files": len(files), "files_kept": len(kept)}


def _begin(partial: Path, told: object, source: Path) -> None:
    """Make the folder of the files, or take it with what is in it if the same conversion left it."""
    digest = hashlib.sha256(json.dumps(told).encode())
    with disk_faults(partial):
        for path in sorted(source.iterdir()):
            facts = path.stat()  # another model of the same shapes would be told in the same words
            digest.update(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
        if (partial / _TOLD).is_file() and (partial / _TOLD).read_text() == digest.hexdigest():
            return
        discard(partial)
        partial.mkdir(parents=True)
        (partial / _TOLD).write_text(digest.hexdigest(), encoding="utf-8")


def find_files(folder: Path) -> Path:
    """Return the folder that holds the torch_dist files.

    Args:
        folder: of Megatron-LM's shape, a run's `checkpoints`, or the files' own.

    Raises:
        CheckpointError: nothing of the kind is there, or its pointer points nowhere.
    """
    if (folder / _FORMAT).is_file():
        return folder
    for pointer in (TRACKER, LATEST):
        if (folder / pointer).is_file():
            try:
                word = text_of(folder / pointer).strip()
            except ValueError as fault:
                raise CheckpointError(
                    f"{folder / pointer}: cannot be read ({fault}); write it anew"
                ) from None
            found = folder / (f"iter_{int(word):07d}" if word.isdecimal() else word)
            if (found / _FORMAT).is_file():
                return found
            raise CheckpointError(f"{folder / pointer} names {word}, but {found / _FORMAT} is missing")
    raise CheckpointError(
        f"{folder}: no Megatron checkpoint: neither {_FORMAT}, {TRACKER} nor {LATEST} is there; only the "
        "torch_dist format is read"
    )


def find_config(folder: Path, given: Path | None) -> Path:
    """Return the folder whose config.json says what a Megatron checkpoint holds.

    Args:
        folder: the checkpoint.
        given: what the user says.

    Raises:
        CheckpointError: nobody says it.
    """
    chosen = given or folder / HF
    if not (chosen / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{chosen / CONFIG_FILE}: missing; give --config FOLDER, a Hugging Face folder of the same "
            "model: a Megatron checkpoint does not say what architecture it is"
        )
    return chosen


def copy_companions(source: Path, target: Path) -> None:
    """Copy a Hugging Face folder's files that are no weights: config.json, tokenizer, templates..."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOT_COMPANIONS):
            shutil.copyfile(file, target / file.name)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to replace what stands at a target.

    Raises:
        CheckpointError: it is there and `force` is not given.
    """
    if os.path.lexists(target) and not force:
        raise CheckpointError(f"{target} exists already; choose another folder, or --force to replace it")
