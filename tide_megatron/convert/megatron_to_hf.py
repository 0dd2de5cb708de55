"""From a Megatron checkpoint to a Hugging Face folder; each rank reads and writes files of its own.

A rank holds one tensor at a time, whatever the model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tide_megatron.base.device import Device
from tide_megatron.base.disk import place_of
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import refuse_damaged
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.stored import StoredTensors
from tide_megatron.convert.conversion import (
    ConvertedFile,
    ShardedEntry,
    convert_files,
    copy_companions,
    find_config,
    find_files,
    refuse_existing,
    sharded_entries,
)
from tide_megatron.convert.spelling import as_stored
from tide_megatron.models.hf.config import CONFIG_FILE, with_dtype, write_config
from tide_megatron.models.hf.safetensors import (
    SHARD_BYTES,
    WEIGHTS_FILE,
    Plan,
    ShardWriter,
    TensorSpec,
    split_plan,
    write_index,
)
from tide_megatron.models.weights import listed, read_architecture
from tide_megatron.parallel.collectives import fail_together, own_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """How the folder shall be written."""

    dtype: torch.dtype | None = None
    """Of parameters; None keeps each as stored. A router bias stays as stored."""
    shard_bytes: int = SHARD_BYTES
    """Largest file."""
    force: bool = False
    """Replace what stands at the target."""


def megatron_to_hf(
    source: Path, target: Path, config: Path | None, written: Written, *, device: Device, stop: StopFlag
) -> dict[str, float]:
    """Convert; a rank function for `launch.run_ranks`. All ranks call it together.

    Args:
        source: a Megatron checkpoint (`conversion.find_files`), whatever layout wrote it.
        target: where the Hugging Face folder shall stand.
        config: a Hugging Face folder of the same model; None: the one inside the checkpoint.
        written: how.
        device: where to work; CPU does.
        stop: not asked: a conversion that was killed goes on.

    Returns:
        `tensors` of the model, `files`, `files_kept` of an earlier try, `seconds`.

    Raises:
        CheckpointError: a target that exists, no checkpoint, tensors that are missing or misshapen (all of
            them named), spellings that are mixed, a damaged file, a full disk.
    """
    started = time.monotonic()
    with fail_together():
        target = place_of(target)
        refuse_existing(target, force=written.force)
        files, companions = find_files(source), find_config(source, config)
        architecture = read_architecture(companions)
    entries, _ = sharded_entries(architecture, device)
    with fail_together():
        refuse_damaged(files, own_share())
        stored = StoredTensors(files)
        entries = as_stored(entries, architecture, stored.entries, files)
        planned, plans = _files(entries, _stored_dtypes(stored, entries), written)
    told = {
        file: {name: [str(tensor.dtype), tensor.shape] for name, tensor in plan.items()}
        for file, plan in plans.items()
    }

    def write(file: ConvertedFile, room: Path, advance: Callable[[], None]) -> None:
        plan = plans[file.name]
        with ShardWriter(room, plan, sys.maxsize) as writer:
            for entry in file.entries:
                for name, tensor in _hf_tensors(stored, entry):
                    if name in plan:  # a file may end between the tensors of an entry
                        writer.write(name, tensor.to(plan[name].dtype))
                advance()

    done = convert_files(files, target, planned, told, write, functools.partial(_finish, companions, plans))
    return {"tensors": len(entries), **done, "seconds": time.monotonic() - started}


def _stored_dtypes(stored: StoredTensors, entries: Sequence[ShardedEntry]) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of ours in a checkpoint that has all of them, in their shapes."""
    missing: set[str] = set()
    misshapen: set[str] = set()
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries:
        for part in entry.places():
            if part.key not in stored.entries:
                missing.add(part.key)
                continue
            wanted, shape = part.global_shape, stored.shape(part.key)
            # A vocabulary may be filled up to a multiple of whatever wrote it.
            is_padded = part.allow_shape_mismatch and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not is_padded:
                misshapen.add(f"{part.key} {list(shape)} instead of {list(wanted)}")
            dtypes[entry.name] = stored.dtype(part.key)
    lines = [
        listed(kind, sorted(names))
        for kind, names in (("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if lines:
        raise CheckpointError(
            f"{stored.found}: does not hold the model that config.json describes:\n" + "\n".join(lines)
        )
    return dtypes


def _files(
    entries: Sequence[ShardedEntry], stored: Mapping[str, torch.dtype], written: Written
) -> tuple[list[ConvertedFile], dict[str, dict[str, TensorSpec]]]:
    """Say what must be read for each file, and what it holds."""
    plan, by_source = {}, {}
    for entry in entries:
        mapping = entry.mapping
        dtype = stored[entry.name] if written.dtype is None or not mapping.is_parameter else written.dtype
        for name, shape in mapping.sources.items():
            plan[name], by_source[name] = TensorSpec(shape, dtype), entry
    plans = split_plan(plan, written.shard_bytes)
    files = []
    for file, tensors in plans.items():
        wanted = {by_source[name].name: by_source[name] for name in tensors}
        files.append(ConvertedFile(name=file, entries=[*wanted.values()]))
    return files, plans


def _hf_tensors(stored: StoredTensors, entry: ShardedEntry) -> Iterator[tuple[str, Tensor]]:
    """Read a tensor of ours; yield Hugging Face's."""
    parts = []
    for part in entry.places():
        sizes = (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape)
        parts.append(stored.read(part.key, part.global_offset, sizes).view(part.local_shape))
    yield from zip(entry.mapping.sources, entry.mapping.split(entry.merged(parts)), strict=True)


def _finish(companions: Path, plans: Mapping[str, Plan], partial: Path, final: Path) -> None:
    """Complete a folder of whole files (first rank only)."""
    copy_companions(companions, final)
    dtypes = {planned.dtype for plan in plans.values() for planned in plan.values()}
    config = json.loads((final / CONFIG_FILE).read_text(encoding="utf-8"))
    if len(dtypes) == 1:
        (dtype,) = dtypes
        config = with_dtype(config, str(dtype).removeprefix("torch."))
    write_config(final, config)
    for file in plans:
        (partial / file / WEIGHTS_FILE).rename(final / file)
    if len(plans) > 1:
        write_index(final, plans)
