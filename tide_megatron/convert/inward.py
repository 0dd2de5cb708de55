"""From a Hugging Face folder to a Megatron checkpoint; each rank reads and writes its share of the tensors.

megatron-core writes a checkpoint in one call, so a rank's share is in memory at once: with N ranks, an Nth of
the model. A conversion that was killed leaves nothing under the target's name and starts anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
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
from tide_megatron.convert.place import HF, RELEASE, TRACKER, copy_companions, refuse_existing
from tide_megatron.convert.slots import Slot, slots_of
from tide_megatron.models.convert import check_names, read_architecture
from tide_megatron.models.folder import HfFolder
from tide_megatron.models.writing import replaced_folder
from tide_megatron.parallel.collectives import broadcast_object, fail_together, is_first, own_share

log = logging.getLogger(__name__)

Item = TypeVar("Item")

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
        `tensors` and `elements` of the whole model, `bytes` that this rank wrote, `seconds`.

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
    elements = [slot.piece.elements for slot in model.slots]
    rank, ranks = own_share()
    share = deal(elements, ranks)[rank]
    with fail_together(), HfFolder(source) as folder:
        slots = [model.slots[number] for number in share]
        state: dict[str, Any] = {
            slot.name: slot.filled(_read(folder, slot, dtype)) for slot in shown(slots, "reading")
        }
    num_bytes = sum(entry.data.nbytes for entry in state.values())
    log.info("writing %.2f GB of %d tensors", num_bytes / 1e9, len(share))
    if is_first():
        state |= {name: dataclasses.replace(entry, replica_id=0) for name, entry in model.extra.items()}
    with replaced_together(target) as partial:
        _save(state, partial / RELEASE)
        with fail_together():
            if is_first():
                (partial / TRACKER).write_text(RELEASE + "\n", encoding="utf-8")
                copy_companions(source, partial / HF)
    return {
        "tensors": len(elements),
        "elements": sum(elements),
        "bytes": num_bytes,
        "seconds": time.monotonic() - started,
    }


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items out to ranks, the largest first and each to whoever has least; numbers, in order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += sizes[number]
    return [sorted(share) for share in shares]


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
    """Let megatron-core write all ranks' tensors."""
    with fail_together():
        files.mkdir(exist_ok=True)
    facts = {"tide_megatron": __version__, "megatron_core": version("megatron-core")}
    try:
        dist_checkpointing.save({"model": state, **ASIDE}, str(files), content_metadata=facts)
    except (Exception, CheckpointException) as fault:
        raise CheckpointError(
            f"{files.parent}: cannot be written ({fault}); make room or choose another folder"
        ) from fault
