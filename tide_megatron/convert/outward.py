"""From a Megatron checkpoint to a Hugging Face folder; each rank reads and writes files of its own.

Files are written one after the other and named only when whole, so a conversion that was cut off goes on
with the file it was in. A rank holds one tensor at a time, whatever the model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.digests import refuse_damaged
from tide_megatron.base.durable import flush
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.table import Table
from tide_megatron.convert.inward import shown
from tide_megatron.convert.place import copy_companions, find_config, find_files, refuse_existing
from tide_megatron.convert.slots import Slot, slots_of
from tide_megatron.convert.unfinished import begin, unfinished
from tide_megatron.models.hf.config import CONFIG_FILE, write_config
from tide_megatron.models.hf.safetensors import (
    SHARD_BYTES,
    WEIGHTS_FILE,
    ShardWriter,
    TensorSpec,
    split_plan,
    write_index,
)
from tide_megatron.models.weights import listed, read_architecture
from tide_megatron.models.writing import replaced_folder
from tide_megatron.parallel.collectives import barrier, broadcast_object, fail_together, is_first, own_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """How the folder shall be written."""

    dtype: torch.dtype | None = None
    """Of parameters; None keeps each as stored. A router bias stays as stored."""
    shard_bytes: int = SHARD_BYTES
    """Largest file."""
    force: bool = False
    """Replace what stands at the target."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file of the folder."""

    name: str
    plan: Mapping[str, TensorSpec]
    slots: list[Slot]
    """What to read for it."""


def megatron_to_hf(
    source: Path, target: Path, config: Path | None, written: Written, *, device: Device, stop: StopFlag
) -> dict[str, float]:
    """Convert; a rank function for `launch.run_ranks`. All ranks call it together.

    Args:
        source: a Megatron checkpoint (`place.find_files`), whatever layout wrote it.
        target: where the Hugging Face folder shall stand.
        config: a Hugging Face folder of the same model; None: the one inside the checkpoint.
        written: how.
        device: where to work; CPU does.
        stop: not asked: a conversion that was killed goes on.

    Returns:
        `tensors` of the model, `files`, `files_kept` of an earlier try, `seconds`.

    Raises:
        CheckpointError: a target that exists, no checkpoint, tensors that are missing or misshapen (all of
            them named), a damaged file, a full disk.
    """
    started = time.monotonic()
    with fail_together():
        refuse_existing(target, force=written.force)
        files, companions = find_files(source), find_config(source, config)
        architecture = read_architecture(companions)
    slots = slots_of(architecture, device).slots
    with fail_together():
        refuse_damaged(files, own_share())
        table = Table(files)
        planned = _files(slots, _stored_dtypes(files, table, slots), written)
    partial = unfinished(target)
    told = {file.name: {name: [str(p.dtype), p.shape] for name, p in file.plan.items()} for file in planned}
    kept = None
    with fail_together():
        if is_first():
            begin(partial, told, files)
            kept = {file.name for file in planned if (partial / file.name).is_file()}
    kept = broadcast_object(kept)
    todo = [file for file in planned if file.name not in kept]
    rank, ranks = own_share()
    own = todo[rank::ranks]
    with fail_together():
        _write_files(table, partial, own)
    with fail_together():
        if is_first():
            _finish(partial, target, planned, companions)
    barrier()
    return {
        "tensors": len(slots),
        "files": len(planned),
        "files_kept": len(kept),
        "seconds": time.monotonic() - started,
    }


def _stored_dtypes(files: Path, table: Table, slots: Sequence[Slot]) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of ours in a checkpoint that has all of them, in their shapes."""
    missing: set[str] = set()
    misshapen: set[str] = set()
    dtypes: dict[str, torch.dtype] = {}
    for slot in slots:
        for part in slot.parts():
            if part.key not in table.tensors:
                missing.add(part.key)
                continue
            wanted, shape = part.global_shape, table.shape(part.key)
            # A vocabulary may be filled up to a multiple of whatever wrote it.
            is_padded = part.allow_shape_mismatch and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not is_padded:
                misshapen.add(f"{part.key} {list(shape)} instead of {list(wanted)}")
            dtypes[slot.name] = table.dtype(part.key)
    lines = [
        listed(kind, sorted(names))
        for kind, names in (("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if lines:
        raise CheckpointError(
            f"{files}: does not hold the model that config.json describes:\n" + "\n".join(lines)
        )
    return dtypes


def _files(slots: Sequence[Slot], stored: Mapping[str, torch.dtype], written: Written) -> list[File]:
    """Say what each file holds, and what must be read for it."""
    plan, by_source = {}, {}
    for slot in slots:
        dtype = stored[slot.name] if written.dtype is None or not slot.piece.is_parameter else written.dtype
        for name, shape in slot.piece.sources.items():
            plan[name], by_source[name] = TensorSpec(shape, dtype), slot
    files = []
    for file, tensors in split_plan(plan, written.shard_bytes).items():
        wanted = {by_source[name].name: by_source[name] for name in tensors}
        files.append(File(name=file, plan=tensors, slots=[*wanted.values()]))
    return files


def _write_files(table: Table, partial: Path, files: Sequence[File]) -> None:
    """Write this rank's files; each has a folder of its own until it is whole."""
    steps = iter(shown(range(sum(len(file.slots) for file in files)), "converting"))
    for file in files:
        room = partial / f"{file.name}.part"
        try:
            room.mkdir(exist_ok=True)
            with ShardWriter(room, file.plan, sys.maxsize) as writer:
                for slot, _ in zip(file.slots, steps, strict=False):
                    for name, tensor in _hf_tensors(table, slot):
                        if name in file.plan:  # a file may end between the tensors of a slot
                            writer.write(name, tensor.to(file.plan[name].dtype))
            flush(room / WEIGHTS_FILE)
            (room / WEIGHTS_FILE).rename(partial / file.name)
            room.rmdir()
        except OSError as fault:
            raise CheckpointError(
                f"{partial / file.name}: cannot be written ({fault}); make room, then start the same command "
                "again: it goes on"
            ) from fault


def _hf_tensors(table: Table, slot: Slot) -> Iterator[tuple[str, Tensor]]:
    """Read a tensor of ours; yield Hugging Face's."""
    tensor = slot.merged([_part(table, part) for part in slot.parts()])
    yield from zip(slot.piece.sources, slot.piece.split(tensor), strict=True)


def _part(table: Table, part: ShardedTensor) -> Tensor:
    """Read a part of a checkpoint's tensor."""
    sizes = (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape)
    return table.read(part.key, part.global_offset, sizes).view(part.local_shape)


def _finish(partial: Path, target: Path, files: Sequence[File], companions: Path) -> None:
    """Complete a folder of whole files and give it its name (first rank only)."""
    with replaced_folder(target) as final:
        copy_companions(companions, final)
        dtypes = {planned.dtype for file in files for planned in file.plan.values()}
        config = json.loads((final / CONFIG_FILE).read_text(encoding="utf-8"))
        if len(dtypes) == 1:
            (dtype,) = dtypes
            config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_config(final, config)
        for file in files:
            (partial / file.name).rename(final / file.name)
        if len(files) > 1:
            write_index(final, {file.name: file.plan for file in files})
    shutil.rmtree(partial, ignore_errors=True)
