"""Prepare data: JSONL chats -> tokens and reply ranges -> columns on disk.

All or nothing: everything is written into a hidden folder beside the target, flushed, and renamed into place
at the end. An error or Ctrl-C removes it; the target is either the old state or the whole new one.

A record that is longer than `max_length` is an error by default, because losing data should be a decision:
`skip` leaves it out, `truncate` cuts it, and a prompt that leaves no room for its reply is then left out
(spec section 4.1). What was left out is counted in the manifest.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich
import rich.progress

from tide_megatron.base.errors import DataError
from tide_megatron.base.files import replaced_folder
from tide_megatron.data.columns import ColumnWriter, digest_file
from tide_megatron.data.manifest import (
    MANIFEST_FILE,
    DataStatistics,
    Manifest,
    SideMetadata,
    TokenizerMetadata,
)
from tide_megatron.data.record import ChatRecord, read_records
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
    sides: Mapping[str, SideChoice] | None = None,
    replace: bool = False,
) -> Manifest:
    """Prepare a data folder from chats.

    Args:
        sources: JSONL files (see `data.record`), read in this order; sample ids follow it.
        tokenizer: the student's, with a chat template.
        out: the folder to make.
        max_length: most tokens a sample may have.
        on_long: a word of `OnLong`.
        sides: name -> tokenizer of a teacher that reads its own tokens; its columns carry the name.
        replace: put the new data in the place of a data folder that is already there.

    Raises:
        ConfigError: an option that cannot be.
        DataError: a bad record (with file and line), no records, or a target that may not be replaced.
    """
    encoder = Encoder(tokenizer, Window.of(max_length, on_long), sides or {})
    out, sources = Path(out), [Path(source) for source in sources]
    _check_target(out, replace=replace)
    missing = [source for source in sources if not source.is_file()]
    if missing or not sources:
        raise DataError(f"{missing[0] if missing else 'sources'}: no such file: name at least one JSONL file")
    with replaced_folder(out, fault_kind=DataError) as folder:
        manifest = _write(folder, sources, encoder)
        manifest.write(folder)
    for name, side in manifest.sides.items():
        logger.info(
            "%s: side %s: %d chunks (%d of one token on both sides) over %d tokens, %d cut, %d without any",
            *(out, name, side.chunks, side.pairs, side.tokens, side.cut, side.without_chunks),
        )
    kept = manifest.statistics
    logger.info(
        "%s: %d samples, %d tokens (%d to learn, %d bytes), %d cut, %d left out",
        *(out, manifest.samples, kept.tokens, kept.reply_tokens, kept.reply_bytes),
        *(kept.truncated, sum(kept.skipped.values())),
    )
    return manifest


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


def _write(folder: Path, sources: Sequence[Path], encoder: Encoder) -> Manifest:
    """Fill `folder` with the columns of all records; return the manifest (not written yet)."""
    writer = ColumnWriter(folder, encoder.columns)
    counts: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    side_counts = {name: collections.Counter[str]() for name in encoder.sides}
    longest: collections.Counter[str] = collections.Counter()
    described = []
    try:
        for source in sources:
            records = 0
            for record in _read_with_progress(source):
                records += 1
                sample = encoder.encode(record)
                if isinstance(sample, str):
                    skipped[sample] += 1
                    continue
                writer.add(sample.row)
                counts.update(sample.counts)
                longest |= sample.longest
                for name, found in sample.side_counts.items():
                    side_counts[name].update(found)
            described.append(_describe_source(source, records))
        if not writer.samples:
            names = ", ".join(str(source) for source in sources)
            raise DataError(
                f"{names}: no samples ({_list_skipped(skipped)}): give records, or raise max_length"
            )
        for name, found in side_counts.items():
            if not found["chunks"]:
                raise DataError(
                    f"teacher {name}: no chunk of any reply is spelled by both sides within its window: "
                    f"raise its max_length above {encoder.side_length(name)}, or look at both templates"
                )
        columns, files = writer.finish()
    finally:
        writer.close()
    return Manifest(
        samples=writer.samples,
        columns=columns,
        files=files,
        tokenizer=TokenizerMetadata.of(encoder.tokenizer),
        max_length=encoder.window.max_length,
        on_long=encoder.window.on_long.value,
        sources=described,
        statistics=DataStatistics(**counts, longest=longest[""], skipped=dict(skipped)),
        sides={
            name: SideMetadata(
                tokenizer=TokenizerMetadata.of(side.tokenizer),
                max_length=encoder.side_length(name),
                longest=longest[name],
                **side_counts[name],
            )
            for name, side in encoder.sides.items()
        },
    )


def _read_with_progress(source: Path) -> Iterator[ChatRecord]:
    """Yield a file's records, on a terminal under a progress bar over its bytes."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
    is_watched = rich.get_console().is_terminal
    with rich.progress.Progress(*columns, transient=True, disable=not is_watched) as bar:
        task = bar.add_task(source.name, total=source.stat().st_size)
        for record in read_records(source):
            yield record
            bar.advance(task, record.size_bytes)


def _describe_source(source: Path, records: int) -> dict[str, object]:
    """Describe a source file; only its name, so that a data folder tells nothing about a machine."""
    return {
        "name": source.name,
        "bytes": os.path.getsize(source),
        "sha256": digest_file(source),
        "records": records,
    }


def _list_skipped(skipped: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "the files are empty"
