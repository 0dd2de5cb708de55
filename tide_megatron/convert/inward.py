"""From a Hugging Face folder to a Megatron checkpoint; each rank reads and writes files of its own.

megatron-core would write a checkpoint in one call, from memory. Here it writes the table of contents and
whatever is no tensor; tensors are written one by one in torch's format, as training checkpoints are
(`checkpoint.piece_file`), and entered into the table. A rank holds one tensor at a time, and a conversion
that was cut off goes on with the file it was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import tide_megatron.platform  # noqa: F401 - before megatron

import torch
from megatron.core import dist_checkpointing
from rich.progress import track
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tide_megatron import __version__
from tide_megatron.base.device import Device
from tide_megatron.base.digests import refuse_damaged
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.piece_file import Entry, enter_pieces, write_pieces
from tide_megatron.checkpoint.pieces import Piece
from tide_megatron.convert.place import HF, RELEASE, TRACKER, copy_companions, refuse_existing
from tide_megatron.convert.slots import Slot, slots_of
from tide_megatron.convert.unfinished import begin, unfinished
from tide_megatron.models.hf.folder import HfFolder
from tide_megatron.models.weights import check_names, read_architecture
from tide_megatron.models.writing import replaced_folder
from tide_megatron.parallel.collectives import broadcast_object, fail_together, is_first, own_share

Item = TypeVar("Item")

FILE_ELEMENTS = 2**28
"""Of a file, unless one tensor alone is larger."""

ASIDE = {"checkpoint_version": 3.0, "iteration": 0}
"""Megatron-LM's own words; its trainer asks for them."""


def hf_to_megatron(
    source: Path, target: Path, dtype: torch.dtype | None, force: bool, *, device: Device, stop: StopFlag
) -> dict[str, float]:
    """Convert; a rank function for `launch.run_ranks`. All ranks call it together.

    Args:
        source: a Hugging Face folder of safetensors.
        target: where the Megatron folder shall stand (`place`).
        dtype: of parameters; None keeps each as stored. A router bias stays as stored.
        force: replace what stands at the target.
        device: where to work; CPU does.
        stop: not asked, the work is minutes.

    Returns:
        `tensors` and `elements` of the model, `files`, `files_kept` of an earlier try, `seconds`.

    Raises:
        CheckpointError: a target that exists, weights that do not fit config.json, a damaged file, a full
            disk.
        ConfigError: a model type or switch that is not implemented.
    """
    started = time.monotonic()
    with fail_together():
        refuse_existing(target, force=force)
        refuse_damaged(source, own_share())
        architecture = read_architecture(source)
        with HfFolder(source) as folder:
            check_names(architecture, folder)
            merged = architecture.has_merged(folder.shapes)
    model = slots_of(architecture, device, merged=merged)
    files = _files(model.slots)
    partial, kept = unfinished(target), None
    told = [str(dtype), [[file.name, [slot.name for slot in file.slots]] for file in files]]
    with fail_together():
        if is_first():
            begin(partial, told, source)
            kept = {file.name for file in files if file.table(partial).is_file()}
    kept = broadcast_object(kept)
    todo = [file for file in files if file.name not in kept]
    rank, ranks = own_share()
    with fail_together(), HfFolder(source) as folder:
        _write_files(folder, partial, todo[rank::ranks], dtype)
    with replaced_together(target) as final:
        _save(dict(model.extra), final / RELEASE)
        with fail_together():
            if is_first():
                _finish(partial, final, files)
                copy_companions(source, final / HF)
    return {
        "tensors": len(model.slots),
        "elements": sum(slot.piece.elements for slot in model.slots),
        "files": len(files),
        "files_kept": len(kept),
        "seconds": time.monotonic() - started,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file of the checkpoint."""

    name: str
    slots: list[Slot]

    def table(self, folder: Path) -> Path:
        """Return where stands, once the file is whole, what lies where in it."""
        return folder / f"{self.name}.json"


def _files(slots: Sequence[Slot]) -> list[File]:
    """Cut a model into files, the same ones for any number of ranks."""
    runs: list[list[Slot]] = []
    room = 0
    for slot in slots:
        if slot.piece.elements > room:
            runs.append([])
            room = FILE_ELEMENTS
        runs[-1].append(slot)
        room -= slot.piece.elements
    return [File(name=f"weights_{number:05d}.distcp", slots=run) for number, run in enumerate(runs)]


def _write_files(folder: HfFolder, partial: Path, files: Sequence[File], dtype: torch.dtype | None) -> None:
    """Write this rank's files."""
    steps = iter(shown(range(sum(len(file.slots) for file in files)), "converting"))
    for file in files:
        path = partial / f"{file.name}.part"
        read = (
            piece
            for slot, _ in zip(file.slots, steps, strict=False)
            for piece in _pieces(slot, _read(folder, slot, dtype))
        )
        try:
            entries, _ = write_pieces(path, read)
            path.rename(partial / file.name)
            lines = [_line(dataclasses.replace(entry, file=file.name)) for entry in entries]
            path.write_text(json.dumps(lines), encoding="utf-8")
            path.rename(file.table(partial))
        except OSError as fault:
            raise CheckpointError(
                f"{partial / file.name}: cannot be written ({fault}); make room, then start the same command "
                "again: it goes on"
            ) from fault


def _line(entry: Entry) -> dict[str, Any]:
    """Return plain values of an entry; `_entry` undoes it."""
    return {**dataclasses.asdict(entry), "dtype": str(entry.dtype).removeprefix("torch.")}


def _entry(line: Mapping[str, Any]) -> Entry:
    axes = {name: tuple(line[name]) for name in ("shape", "offsets", "sizes")}
    return Entry(**{**line, **axes, "dtype": getattr(torch, line["dtype"])})


def _pieces(slot: Slot, tensor: Tensor) -> Iterator[Piece]:
    """Yield what a tensor of ours is in the checkpoint."""
    for part in slot.parts(tensor):
        assert part.data is not None, "it was given"
        yield Piece.of(part, part.data.contiguous())


def _finish(partial: Path, final: Path, files: Sequence[File]) -> None:
    """Move the files to a checkpoint and enter them into its table of contents (first rank only)."""
    entries = []
    for file in files:
        lines = json.loads(file.table(partial).read_text(encoding="utf-8"))
        entries += [_entry(line) for line in lines]
        (partial / file.name).rename(final / RELEASE / file.name)
    enter_pieces(final / RELEASE, entries)
    (final / TRACKER).write_text(RELEASE + "\n", encoding="utf-8")
    shutil.rmtree(partial, ignore_errors=True)


def shown(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield items under a progress bar on the first rank."""
    return iter(track(items, description=what, transient=True, disable=not is_first()))


@contextlib.contextmanager
def replaced_together(target: Path) -> Iterator[Path]:
    """Give all ranks one folder to fill that then takes the target's place; see `replaced_folder`.

    All ranks enter and leave it together; an error in the block must reach all of them.
    """
    with contextlib.ExitStack() as ends:
        partial = None
        with fail_together():
            if is_first():
                partial = ends.enter_context(replaced_folder(target))
        yield broadcast_object(partial)
        with fail_together():
            ends.close()


def _read(folder: HfFolder, slot: Slot, dtype: torch.dtype | None) -> Tensor:
    """Read and join one tensor of ours."""
    piece = slot.piece
    joined = piece.join([folder.read(name, piece.part(name)) for name in piece.sources])
    return joined.to(dtype) if dtype is not None and piece.is_parameter else joined


def _save(state: dict[str, Any], files: Path) -> None:
    """Let megatron-core write the table of contents and what is no tensor."""
    with fail_together():
        files.mkdir(exist_ok=True)
    facts = {"tide_megatron": __version__, "megatron_core": version("megatron-core")}
    try:
        dist_checkpointing.save({"model": state, **ASIDE}, str(files), content_metadata=facts)
    except (Exception, CheckpointException) as fault:
        raise CheckpointError(
            f"{files.parent}: cannot be written ({fault}); make room or choose another folder"
        ) from fault
