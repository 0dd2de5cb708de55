"""Prepare data: JSONL chats -> tokens and reply ranges -> columns on disk.

All or nothing: everything is written into a hidden folder beside the target, flushed, and renamed into place
at the end; the target is either the old state or the whole new one. Bad data leaves nothing behind. Whatever
else ends it (a kill, Ctrl-C, a full disk), the hidden folder stays once something in it is certain, and the
same call goes on there, to the same bytes. Other options, records or code begin anew.

A record that cannot be used, or is longer than `max_length`, is an error by default, because losing data
should be a decision. Even then all records are looked at first, so that the message counts all faults by
kind. `on_bad: skip` leaves bad records out and lists them in rejects.jsonl; `on_long: skip` leaves long ones
out, `truncate` cuts them, and a prompt that leaves no room for its reply is then left out (spec section 4.1).
What was left out is counted in the manifest.

Several tasks may share the records, by blocks: each writes a part, which the same rules hold for.

Each sample remembers its source, for scores by source: what the record's `source` says, else its file.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tide_megatron.base.disk import disk_faults, place_of
from tide_megatron.base.errors import ConfigError, DataError, nearest
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation.going_on import filled_folder
from tide_megatron.data.preparation.identity import Plan, TaskPart
from tide_megatron.data.preparation.part_merge import is_part
from tide_megatron.data.preparation.rejects import OnBad
from tide_megatron.data.preparation.sample import Encoder, OnLong, SideChoice, Window
from tide_megatron.data.preparation.target import check_target, report
from tide_megatron.data.sets.merging import folders_of_parts, is_done, merge_if_last
from tide_megatron.data.sources.opening import FoundSources, find_sources
from tide_megatron.data.sources.record import Reading
from tide_megatron.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def prepare(
    sources: Sequence[Path] | FoundSources,
    tokenizer: Tokenizer,
    out: Path,
    *,
    max_length: int,
    on_long: str = OnLong.ERROR,
    on_bad: str = OnBad.STOP,
    reading: Reading | None = None,
    sides: Mapping[str, SideChoice] | None = None,
    replace: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Prepare a data folder from chats.

    Args:
        sources: files of chats, folders or globs of them, pipes, `-` for stdin, or what was found of such
            (`data.sources`), read in this order; sample ids follow it.
        tokenizer: the student's, with a chat template.
        out: the folder to make.
        max_length: most tokens a sample may have.
        on_long: a word of `OnLong`.
        on_bad: a word of `OnBad`.
        reading: how records are read, and which replies are learnt.
        sides: name -> tokenizer of a teacher that reads its own tokens; its columns carry the name.
        replace: put the new data in the place of a data folder that is already there.
        workers: processes that encode, once there are many records; None: as many as there are cores. What is
            written does not depend on it.

    Raises:
        ConfigError: an option that cannot be.
        DataError: bad records (with file and line of the first), no records, or a target that may not be
            replaced.
    """
    plan = plan_of(
        sources,
        tokenizer,
        max_length=max_length,
        on_long=on_long,
        on_bad=on_bad,
        reading=reading,
        sides=sides,
    )
    return prepare_whole(plan, out, replace=replace, workers=workers)


def prepare_whole(plan: Plan, out: Path, *, replace: bool = False, workers: int | None = None) -> Manifest:
    """Prepare a data folder; arguments and errors are those of `prepare`."""
    number, out = _processes(workers), place_of(out, DataError)
    with disk_faults(out, DataError), leased(lease_beside(out), str(out), DataError) as lease:
        check_target(out, replace=replace)
        check_sources(plan)
        with filled_folder(out, plan, number, lease) as (work, filling):
            manifest = filling.finish()
            manifest.write(work.data)
    report(out, manifest)
    return manifest


def prepare_part(
    plan: Plan, part: TaskPart, out: Path, *, replace: bool = False, workers: int | None = None
) -> Manifest | None:
    """Prepare one part of a data folder beside it, in OUT.parts; put all together if it was the last.

    Args:
        plan: of the whole.
        part: which records are encoded here.
        out: the folder that the parts become.
        replace: put the new data in the place of a data folder that is there.
        workers: as for `prepare`.

    Returns:
        What was put together; None: parts are missing, or another task has done it or does it.

    Raises:
        ConfigError, DataError: as `prepare`; a source that can be read only once.
    """
    number, plan = _processes(workers), dataclasses.replace(plan, part=part)
    out = place_of(out, DataError)
    folder = folders_of_parts(out, part.total)[part.number - 1]
    with disk_faults(folder, DataError), leased(lease_beside(folder), str(folder), DataError) as lease:
        check_sources(plan)
        if not all(source.can_be_read_again for source in plan.sources()):
            raise DataError(
                "part: every task reads the sources, and a pipe can be read once: write it to a file"
            )
        if is_done(folder, plan):
            logger.info("%s: is there already, from the same records", folder)
        else:
            if not is_part(folder):
                check_target(folder, replace=False)
            with filled_folder(folder, plan, number, lease) as (_, filling):
                filling.finish_part()
    return merge_if_last(out, part.total, replace=replace)


def plan_of(
    sources: Sequence[Path] | FoundSources,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_long: str = OnLong.ERROR,
    on_bad: str = OnBad.STOP,
    reading: Reading | None = None,
    sides: Mapping[str, SideChoice] | None = None,
) -> Plan:
    """Check options; the arguments are those of `prepare`.

    Raises:
        ConfigError: an option that cannot be.
    """
    encoder = Encoder(tokenizer, Window.of(max_length, on_long), sides or {}, reading)
    words = [word.value for word in OnBad]
    if on_bad not in words:
        raise ConfigError(f"on_bad: {on_bad!r} is unknown: {nearest(on_bad, words)}")
    return Plan(encoder=encoder, found=find_sources(sources), on_bad=OnBad(on_bad))


def _processes(workers: int | None) -> int:
    number = len(os.sched_getaffinity(0)) if workers is None else workers
    if number < 1:
        raise ConfigError(f"workers: {workers} is not a number of processes; use 1 or more")
    return number


def check_sources(plan: Plan) -> None:
    """Refuse sources that are not there, before anything is read.

    Raises:
        DataError: names the first.
    """
    if not plan.found.files:
        raise DataError("sources: no such file: name at least one file of chats, or - for stdin")
    for source in plan.sources():
        source.check()
