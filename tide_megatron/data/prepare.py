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

Each sample remembers its source, for scores by source: what the record's `source` says, else its file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.disk import disk_faults, disk_words, place_of
from tide_megatron.base.errors import ConfigError, DataError, nearest
from tide_megatron.base.lease import Lease, lease_beside, leased
from tide_megatron.base.stop import is_stop
from tide_megatron.base.unfinished import DamagedWork, Unfinished, unfinished_folder
from tide_megatron.data.filling import Filling, RecordsChanged, can_be_read_again, listed
from tide_megatron.data.identity import Plan, differences
from tide_megatron.data.manifest import MANIFEST_FILE, Manifest
from tide_megatron.data.parallel_encoder import EncoderKilled, ParallelEncoder
from tide_megatron.data.rejects import REJECTS_FILE, OnBad
from tide_megatron.data.sample import Encoder, OnLong, SideChoice, Window
from tide_megatron.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def prepare(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    max_length: int,
    on_long: str = OnLong.ERROR,
    on_bad: str = OnBad.STOP,
    normalize: bool = False,
    sides: Mapping[str, SideChoice] | None = None,
    replace: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Prepare a data folder from chats.

    Args:
        sources: JSONL files, plain or compressed, pipes, or `-` for stdin, read in this order (see
            `data.record`); sample ids follow it.
        tokenizer: the student's, with a chat template.
        out: the folder to make.
        max_length: most tokens a sample may have.
        on_long: a word of `OnLong`.
        on_bad: a word of `OnBad`.
        normalize: put all text of the records into NFC, for tokenizers that do so themselves.
        sides: name -> tokenizer of a teacher that reads its own tokens; its columns carry the name.
        replace: put the new data in the place of a data folder that is already there.
        workers: processes that encode, once there are many records; None: as many as there are cores. What is
            written does not depend on it.

    Raises:
        ConfigError: an option that cannot be.
        DataError: bad records (with file and line of the first), no records, or a target that may not be
            replaced.
    """
    encoder = Encoder(tokenizer, Window.of(max_length, on_long), sides or {})
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not a number of processes; use 1 or more")
    words = [word.value for word in OnBad]
    if on_bad not in words:
        raise ConfigError(f"on_bad: {on_bad!r} is unknown: {nearest(on_bad, words)}")
    plan = Plan(encoder=encoder, paths=list(sources), on_bad=OnBad(on_bad), normalize=normalize)
    out = place_of(out, DataError)
    with disk_faults(out, DataError), leased(lease_beside(out), str(out), DataError) as lease:
        _check_target(out, replace=replace)
        check_sources(plan)
        with (
            unfinished_folder(out) as work,
            _told(work, lease, out),
            ParallelEncoder(encoder, normalize=normalize, number=workers) as processes,
            _filled(work, plan, processes, lease, out) as filling,
        ):
            manifest = filling.finish()
            manifest.write(work.data)
            lease.check()
    _report(out, manifest)
    return manifest


def check_sources(plan: Plan) -> None:
    """Refuse sources that are not there, before anything is read.

    Raises:
        DataError: names the first.
    """
    if not plan.paths:
        raise DataError("sources: no such file: name at least one JSONL file, or - for stdin")
    for source in plan.sources():
        source.check()


@contextlib.contextmanager
def _filled(
    work: Unfinished, plan: Plan, processes: ParallelEncoder, lease: Lease, out: Path
) -> Iterator[Filling]:
    """Give a filling that has read all records, going on with an earlier start's work if that is of use."""
    with contextlib.ExitStack() as stack:
        try:
            state = _certain(work, plan)
            if state is not None:
                work.go_on(state)
                filling = stack.enter_context(Filling(work, plan, processes, lease, state))
                logger.info("%s: goes on behind record %d of an earlier start", out, state["records"])
                filling.read(out.name)
        except (DamagedWork, RecordsChanged) as why:
            logger.warning("%s: an earlier start's work is of no use, begins anew: %s", out, why)
            stack.close()
            state = None
        if state is None:
            work.begin()
            filling = stack.enter_context(Filling(work, plan, processes, lease))
            filling.read(out.name)
        yield filling


def _certain(work: Unfinished, plan: Plan) -> dict[str, Any] | None:
    """Return what an earlier start has done; None: nothing.

    Raises:
        DamagedWork: something, but it is of no use here; the message says why.
    """
    state = work.committed()
    if state is None:
        return None
    if others := differences(state.get("identity") or {}, plan.identity()):
        raise DamagedWork(f"it was made with another {', another '.join(others)}")
    if not all(can_be_read_again(source) for source in plan.sources()):
        raise DamagedWork("a pipe cannot be read again")
    return state


@contextlib.contextmanager
def _told(work: Unfinished, lease: Lease, out: Path) -> Iterator[None]:
    """Decide what becomes of the work when the block ends early, and say so.

    Raises:
        DataError: of the block; or the disk refused.
    """
    try:
        yield
    except EncoderKilled as fault:
        raise DataError(f"{fault}{_promise(work)}") from None
    except DataError:
        work.is_kept = not _is_held(lease)  # what another process has taken over is left to it
        raise
    except OSError as fault:
        raise DataError(disk_words(fault, out, _promise(work))) from fault
    except BaseException as end:
        if is_stop(end) or isinstance(end, KeyboardInterrupt):
            logger.warning("%s: stopped%s", out, _promise(work) or "; nothing was written")
        raise


def _promise(work: Unfinished) -> str:
    """Say what the next start will do with the work."""
    return f"; the same command goes on behind record {work.state['records']}" if work.is_kept else ""


def _is_held(lease: Lease) -> bool:
    try:
        lease.check()
    except DataError:
        return False
    return True


def _report(out: Path, manifest: Manifest) -> None:
    """Log what was written and what was left out."""
    for name, side in manifest.sides.items():
        logger.info(
            "%s: side %s: %d chunks (%d of one token on both sides) over %d tokens, %d cut, %d without any",
            *(out, name, side.chunks, side.pairs, side.tokens, side.cut, side.without_chunks),
        )
    if manifest.rejected:
        logger.warning(
            "%s: %d bad records were left out (%s); %s has their lines",
            *(out, sum(manifest.rejected.values()), listed(manifest.rejected), out / REJECTS_FILE),
        )
    kept = manifest.statistics
    logger.info(
        "%s: %d samples, %d tokens (%d to learn, %d bytes), %d cut, %d left out",
        *(out, manifest.samples, kept.tokens, kept.reply_tokens, kept.reply_bytes),
        *(kept.truncated, sum(kept.skipped.values()) + sum(manifest.rejected.values())),
    )


def _check_target(out: Path, *, replace: bool) -> None:
    """Refuse a target that exists, unless it is prepared data and may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(
            f"{out}: exists and is no prepared data, so it is never replaced: choose another folder"
        )
    if not replace:
        raise DataError(f"{out}: exists: choose another folder, or ask for it to be replaced (--replace)")
