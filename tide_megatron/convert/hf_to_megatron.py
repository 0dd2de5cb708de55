"""From a Hugging Face folder to a Megatron checkpoint; each rank reads and writes files of its own.

megatron-core would write a checkpoint in one call, from memory. Here torch's writer below it is used, as for
training checkpoints (`checkpoint.writer`), and asks for one tensor at a time, so that is what a rank holds.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tide_megatron.platform

import torch
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from tide_megatron.base.device import Device
from tide_megatron.base.disk import place_of
from tide_megatron.base.files import refuse_damaged, write_text
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.planner import LocalShard, ShardPlanner
from tide_megatron.checkpoint.reading import read_table
from tide_megatron.checkpoint.writer import DigestingWriter, write_common
from tide_megatron.convert.conversion import (
    HF,
    RELEASE,
    TRACKER,
    ConvertedFile,
    ShardedEntry,
    convert_files,
    copy_companions,
    refuse_existing,
    sharded_entries,
)
from tide_megatron.convert.spelling import Layers, as_written
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.verify import ZeroWatch, refuse_other_head, warn_of_doubts
from tide_megatron.models.weights import check_names, read_architecture
from tide_megatron.parallel.collectives import fail_together, own_share

FILE_ELEMENTS = 2**28
"""Of a file, unless one tensor alone is larger."""

ASIDE = {"checkpoint_version": 3.0, "iteration": 0}
"""Megatron-LM's own words; its trainer asks for them."""


def hf_to_megatron(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    force: bool,
    layers: Layers = "local",
    *,
    device: Device,
    stop: StopFlag,
) -> dict[str, float]:
    """Convert; a rank function for `launch.run_ranks`. All ranks call it together.

    Args:
        source: a Hugging Face folder of safetensors.
        target: where the Megatron folder shall stand (`conversion`).
        dtype: of parameters; None keeps each as stored. A router bias stays as stored.
        force: replace what stands at the target.
        layers: whose names the norms have (`spelling`).
        device: where to work; CPU does.
        stop: not asked: a conversion that was killed goes on.

    Returns:
        `tensors` and `elements` of the model, `files`, `files_kept` of an earlier try, `seconds`.

    Raises:
        CheckpointError: a target that exists, weights that do not fit config.json, a damaged file, a full
            disk.
        ConfigError: a model type or switch that is not implemented.
    """
    started = time.monotonic()
    with fail_together():
        target = place_of(target)
        refuse_existing(target, force=force)
        refuse_damaged(source, own_share())
        architecture = read_architecture(source)
        with HfFolder(source) as folder:
            check_names(architecture, folder)
            refuse_other_head(architecture, folder, own_share())
            merged = architecture.has_merged(folder.shapes)
    entries, extra = sharded_entries(architecture, device, merged=merged)
    entries = as_written(entries, architecture, layers)
    if layers == "te":
        extra = {}
    objects = {value.unique_key: value.data for value in extra.values() if is_main_replica(value.replica_id)}
    files = _files(entries)
    told = [str(dtype), layers, [[file.name, [entry.name for entry in file.entries]] for file in files]]
    with HfFolder(source) as folder:
        reading = [
            _Reading(folder, file.entries, dtype, objects if file is files[0] else {}) for file in files
        ]
        plans, table = _planned(target.parent, reading)

        def write(file: ConvertedFile, room: Path, advance: Callable[[], None]) -> None:
            number = files.index(file)
            reading[number].advance = advance
            writer = DigestingWriter(room)
            results = writer.write_data(plans[number], reading[number]).wait()
            writer.finish(Metadata({}), [results])

        done = convert_files(
            source, target, files, told, write, functools.partial(_finish, source, files, table)
        )
        zeros = ZeroWatch(name for one in reading for name in one.zeros.names)
        warn_of_doubts(architecture, folder, zeros)
    return {
        "tensors": len(entries),
        "elements": sum(entry.mapping.elements for entry in entries),
        **done,
        "seconds": time.monotonic() - started,
    }


def _files(entries: Sequence[ShardedEntry]) -> list[ConvertedFile]:
    """Cut a model into files, the same ones for any number of ranks."""
    runs: list[list[ShardedEntry]] = []
    room = 0
    for entry in entries:
        if entry.mapping.elements > room:
            runs.append([])
            room = FILE_ELEMENTS
        runs[-1].append(entry)
        room -= entry.mapping.elements
    return [ConvertedFile(name=f"weights_{number:05d}", entries=run) for number, run in enumerate(runs)]


class _Reading(ShardPlanner):
    """Reads the tensors of a file when torch's writer asks for them, one at a time."""

    def __init__(
        self,
        folder: HfFolder,
        entries: Sequence[ShardedEntry],
        dtype: torch.dtype | None,
        objects: Mapping[str, Any],
    ) -> None:
        self._folder, self._dtype = folder, dtype
        self.advance: Callable[[], None] = lambda: None
        self.zeros = ZeroWatch()
        shards: list[LocalShard] = []
        self._entries: dict[tuple[str, tuple[int, ...]], ShardedEntry] = {}
        for entry in entries:
            own = [
                LocalShard.of(part, part.data.contiguous()) for part in entry.places(self._dtype_of(entry))
            ]
            self._entries |= {(shard.name, shard.offsets): entry for shard in own}
            shards += own
        super().__init__(shards, objects)
        self._last: tuple[ShardedEntry, ShardPlanner] | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the values of an item of the plan."""
        entry = self._entries.get((write_item.index.fqn, tuple(write_item.index.offset or ())))
        if entry is None:
            return super().resolve_data(write_item)
        if self._last is None or self._last[0] is not entry:
            self._last = None  # let go of it before the next is read
            parts = entry.parts(self._joined(entry))
            shards = [LocalShard.of(part, part.data.contiguous()) for part in parts]
            self._last = entry, ShardPlanner(shards, {})
            self.advance()
        return self._last[1].resolve_data(write_item)

    def _joined(self, entry: ShardedEntry) -> Tensor:
        """Read and join one tensor of ours."""
        joined = entry.mapping.join(self.zeros.read(self._folder, entry.mapping))
        return joined.to(self._dtype_of(entry))

    def _dtype_of(self, entry: ShardedEntry) -> torch.dtype:
        """Return the dtype that a tensor of ours is written in."""
        if self._dtype is not None and entry.mapping.is_parameter:
            return self._dtype
        return functools.reduce(torch.promote_types, map(self._folder.dtype, entry.mapping.sources))


def _planned(folder: Path, files: Sequence[ShardPlanner]) -> tuple[list[SavePlan], Metadata]:
    """Return what is written into each file, and the table of contents, yet without places."""
    plans, table = files[0].create_global_plan([file.create_local_plan() for file in files])
    return DigestingWriter(folder).prepare_global_plan(plans), table


def _finish(
    source: Path, files: Sequence[ConvertedFile], table: Metadata, partial: Path, final: Path
) -> None:
    """Move the files to a checkpoint and enter them into its table of contents (first rank only)."""
    (final / RELEASE).mkdir()
    results = []
    for file in files:
        places = read_table(partial / file.name).storage_data
        results += [WriteResult(index, place.length, place) for index, place in places.items()]
        for path in (partial / file.name).glob("*.distcp"):
            path.rename(final / RELEASE / path.name)
    DigestingWriter(final / RELEASE).finish(table, [results])
    write_common(final / RELEASE, ASIDE, {})
    write_text(final / TRACKER, RELEASE + "\n")
    copy_companions(source, final / HF)
