"""Several folders become one: parts of one preparation, or data sets of one tokenizer.

All or nothing, under a lease on the place, as every data folder is made. Columns are copied by bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from tide_megatron.base.disk import disk_faults, place_of
from tide_megatron.base.errors import DataError
from tide_megatron.base.files import digest_of
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.base.unfinished import Unfinished, unfinished_folder
from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation.identity import Plan, differences
from tide_megatron.data.preparation.part import read_part
from tide_megatron.data.preparation.part_merge import checked_parts, is_part, merge_parts
from tide_megatron.data.preparation.target import check_target, report
from tide_megatron.data.sets.set_merge import checked_sets, merge_sets

logger = logging.getLogger(__name__)


class PlaceTaken(DataError):
    """Another process is at work there."""


def merge(out: Path, folders: Sequence[Path], *, replace: bool = False) -> Manifest:
    """Put prepared data together in a new folder; what it is made of stays.

    Args:
        out: the folder to make.
        folders: all parts of one preparation, in any order: the result is what one process would have
            written. Or data sets of one tokenizer, window and teachers: their samples follow one another.
        replace: put it in the place of a data folder that is there.

    Raises:
        DataError: they do not belong together, one is damaged or missing, or the target may not be replaced.
    """
    if not folders:
        raise DataError("merge: name the folders to put together")
    are_parts = [is_part(folder) for folder in folders]
    if all(are_parts):
        parts = checked_parts(folders)
        return made(out, lambda work: merge_parts(parts, work), replace=replace)
    if any(are_parts):
        part, other = folders[are_parts.index(True)], folders[are_parts.index(False)]
        raise DataError(
            f"{part}: is a part of a preparation and {other} is none: merge parts with parts, then data sets"
        )
    sets = checked_sets(folders)
    return made(out, lambda work: merge_sets(sets, work), replace=replace)


def made(out: Path, write: Callable[[Unfinished], Manifest], *, replace: bool) -> Manifest:
    """Make a data folder in one go.

    Args:
        out: where it shall stand.
        write: fills the folder and returns its manifest.
        replace: put it in the place of a data folder that is there.

    Raises:
        PlaceTaken: another process makes it.
        DataError: of `write`; the target may not be replaced, or the disk refuses.
    """
    out = place_of(out, DataError)
    with disk_faults(out, DataError), leased(lease_beside(out), str(out), PlaceTaken) as lease:
        check_target(out, replace=replace)
        with unfinished_folder(out) as work:
            work.begin()
            manifest = write(work)
            manifest.write(work.data)
            lease.check()
    report(out, manifest)
    return manifest


def folders_of_parts(out: Path, total: int) -> list[Path]:
    """Return where the parts of a data folder are made."""
    return [out.with_name(f"{out.name}.parts") / f"{number}-of-{total}" for number in range(1, total + 1)]


def is_done(folder: Path, plan: Plan) -> bool:
    """Say whether a part was made already, as it would be made now."""
    if not is_part(folder):
        return False
    facts = read_part(folder)
    if differences(facts["identity"], plan.identity()):
        return False
    found = [digest_of(source.path) for source in plan.sources()]
    return found == [(source["bytes"], source["sha256"]) for source in facts["sources"]]


def merge_if_last(out: Path, total: int, *, replace: bool) -> Manifest | None:
    """Put parts together if all are there; None: they are not, or another task does it or has done it.

    Two tasks that finish at once both find all parts; one gets the lease. Where a file server shows a task
    the others' parts late, it may be that none does: then `tide data merge` does.

    Raises:
        DataError: as `merge`.
    """
    folders = folders_of_parts(out, total)
    done = sum(map(is_part, folders))
    again = f"tide data merge {out} {folders[0].parent}/*-of-{total}"
    if done < total:
        logger.info("%s: %d of %d parts are there; the last task puts them together", out, done, total)
        return None
    if out.exists() and not replace:
        logger.info("%s: is there already; to make it anew: %s --replace", out, again)
        return None
    try:
        return merge(out, folders, replace=replace)
    except PlaceTaken as fault:
        logger.info("%s: all parts are there, another task puts them together (%s)", out, fault)
        return None
