"""Which checkpoint a run goes on from: the newest that is whole, byte for byte.

What is damaged is said, set aside under `*.damaged`, and never used; that nothing is whole is an error, not a
fresh start. `latest` is for people and tools: where it is missing or points at something else, the newest
whole checkpoint wins, because a kill may fall between the rename of a checkpoint and the move of `latest`.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tide_megatron.base.digests import damage, read_digests
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.durable import point_latest
from tide_megatron.checkpoint.names import DAMAGED, LATEST, Mark, listed, remove_leftovers
from tide_megatron.parallel.collectives import (
    broadcast_object,
    fail_together,
    gather_objects,
    is_first,
    own_share,
)

log = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None where the run has none yet. Collective.

    Leftovers of killed saves are removed. The ranks share the reading of the files.

    Raises:
        CheckpointError: on every rank, when there are checkpoints, or a `latest`, and none is whole.
    """
    names: list[str] = []
    with fail_together():
        if is_first():
            left = remove_leftovers(folder)
            if left:
                log.info("removed what an interrupted save left: %s", ", ".join(left))
            names = [path.name for path in reversed(listed(folder))]
    names = broadcast_object(names if is_first() else None)
    damaged: dict[str, list[str]] = {}
    for name in names:
        faults = _damage_together(folder / name)
        if not faults:
            with fail_together():
                if is_first():
                    _settle(folder, name, damaged)
            return folder / name
        damaged[name] = faults
    with fail_together():
        if damaged or (folder / LATEST).exists():
            raise CheckpointError(_none_whole(folder, damaged))
    return None


def _damage_together(path: Path) -> list[str]:
    """Say what is wrong with a checkpoint, each rank having read its share."""
    started = time.monotonic()
    seen = gather_objects(damage(path, own_share()))
    faults = list(dict.fromkeys(fault for of_rank in seen for fault in of_rank))
    if not faults:
        size = sum(bytes_ for bytes_, _ in read_digests(path).values())
        log.info("%s is whole: %.1f MB verified in %.2f s", path.name, size / 1e6, time.monotonic() - started)
    return faults


def _settle(folder: Path, name: str, damaged: dict[str, list[str]]) -> None:
    """Warn of damaged checkpoints, set them aside, and let `latest` name the one that is used (rank 0)."""
    found = Mark.of(folder / name)
    for bad, faults in damaged.items():
        lost = Mark.of(folder / bad)
        log.warning(
            "%s is damaged (%s); going on from %s: %d steps, %d samples will be trained again",
            bad,
            "; ".join(faults),
            name,
            lost.step - found.step,
            lost.consumed - found.consumed,
        )
        (folder / bad).rename(folder / f"{bad}{DAMAGED}")
    latest = folder / LATEST
    said = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if said != name:
        if said not in damaged:
            log.warning("%s names %r; going on from %s, the newest whole checkpoint", latest, said, name)
        point_latest(folder, name)


def _none_whole(folder: Path, damaged: dict[str, list[str]]) -> str:
    """Say that a run cannot go on."""
    lines = [f"\n  {name}: {'; '.join(faults)}" for name, faults in damaged.items()]
    return (
        f"{folder}: none of its checkpoints is whole{''.join(lines) or f' ({LATEST} names a missing one)'}\n"
        "put a whole one back, or start over with --fresh or another folder="
    )
