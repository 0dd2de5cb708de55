"""The folder around a save: made beside the others, completed by rank 0, renamed when it is whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from tide_megatron.base.digests import Digests, write_digests
from tide_megatron.base.durable import flush
from tide_megatron.base.errors import CheckpointError
from tide_megatron.checkpoint.durable import flush_tree, point_latest
from tide_megatron.checkpoint.facts import Facts, write_facts
from tide_megatron.checkpoint.names import PARTIAL, remove
from tide_megatron.checkpoint.piece_file import Entry, enter_pieces
from tide_megatron.parallel.collectives import fail_together, is_first


def begin_folder(folder: Path, name: str) -> Path:
    """Make the folder that a checkpoint is written in, empty. Collective.

    Raises:
        CheckpointError: on every rank, when the disk refuses.
    """
    partial = folder / f"{name}{PARTIAL}"
    with fail_together(), disk(partial):
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    return partial


def complete_folder(partial: Path, facts: Facts, entries: Sequence[Entry], digests: Digests) -> Path:
    """Give a checkpoint that all ranks have written its table, facts, digests and name (rank 0).

    Args:
        partial: the folder.
        facts: what state.json will say.
        entries: the pieces that the ranks wrote.
        digests: of the files that the ranks wrote.

    Returns:
        The finished checkpoint's folder.

    Raises:
        OSError: the disk refuses.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    enter_pieces(partial, entries)
    write_facts(partial, facts)
    write_digests(partial, digests)
    flush_tree(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    flush(final.parent)
    point_latest(final.parent, final.name)
    return final


@contextlib.contextmanager
def disk(partial: Path) -> Iterator[None]:
    """Say in one line that writing failed, whatever a library raised."""
    try:
        yield
    except (Exception, CheckpointException) as fault:  # torch's class is no Exception
        raise CheckpointError(
            f"{partial}: cannot be written ({last_line(fault)}); make room or choose another folder=, then "
            "start again: the run goes on from its last whole checkpoint"
        ) from fault


def last_line(fault: BaseException) -> str:
    """Return the last words of a library's complaint, which may hold whole tracebacks of other ranks."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[-1]}" if lines else type(fault).__name__
